//! The same without sideway: a protection domain of rdma-mummy-sys, and the `ibv_mr` that comes back.
//!
//! It says which card it has used, and fails where the region is not the library's, or is left in the domain.

use std::error::Error;
use std::ffi::CStr;
use std::ptr::null_mut;

use peerbuf::Access;
use peerbuf::export::memfd;
use peerbuf_rdma::Domain;
use rdma_mummy_sys::{
    ibv_alloc_pd, ibv_close_device, ibv_dealloc_pd, ibv_free_device_list, ibv_get_device_list,
    ibv_get_device_name, ibv_mr, ibv_open_device, ibv_pd,
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut count = 0;
    // SAFETY: the library fills the number in.
    let devices = unsafe { ibv_get_device_list(&mut count) };
    if devices.is_null() || count == 0 {
        return Err("there is no card".into());
    }
    // SAFETY: the list has a device, which is kept by its context when the list is freed.
    let (name, context) = unsafe {
        let name = CStr::from_ptr(ibv_get_device_name(*devices)).to_owned();
        let context = ibv_open_device(*devices);
        ibv_free_device_list(devices);
        (name, context)
    };
    // SAFETY: the library answers null for a null context, and takes none that is gone.
    let domain = unsafe { ibv_alloc_pd(context) };
    if domain.is_null() {
        return Err("the card gives no protection domain".into());
    }
    let keys = register(domain)?;
    // SAFETY: both are live, and nothing of them is used later. A domain with a region in it is busy.
    let ended = unsafe { (ibv_dealloc_pd(domain), ibv_close_device(context)) };
    if ended != (0, 0) {
        return Err(format!("the domain and the card were still in use: {ended:?}").into());
    }
    println!(
        "{}: lkey {:#x}, rkey {:#x}",
        name.to_string_lossy(),
        keys.0,
        keys.1
    );
    Ok(())
}

fn register(pd: *mut ibv_pd) -> Result<(u32, u32), Box<dyn Error>> {
    // SAFETY: it is null, which is refused.
    if unsafe { Domain::from_raw(null_mut()) }.is_ok() {
        return Err("nothing was taken for a domain".into());
    }
    // SAFETY: the domain outlives this function, and with it everything that is made here.
    let domain = unsafe { Domain::from_raw(pd.cast()) }?;
    let buffer = memfd::export("memory", 8192)?;
    let region = domain.register(&buffer.range(4096, 4096)?, Some(Access::ReadWrite))?;
    let raw = region
        .as_raw()
        .ok_or("the library did not make the region")?;
    // SAFETY: live as long as the registration.
    let mr = unsafe { raw.cast::<ibv_mr>().read() };
    let first = region.sge(0, 4096)?;
    let same = (mr.lkey, mr.rkey, mr.pd) == (region.lkey(), region.rkey(), pd);
    match same && (first.lkey, first.address) == (mr.lkey, 4096) {
        true => Ok((mr.lkey, mr.rkey)),
        false => Err("the region is another one than the library's".into()),
    }
}
