//! Loads libibverbs, checks the results of its calls, and lists its devices.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use super::abi::{CompChannel, Context, Cq, GidEntry, Mr, Pd, PortAttr, Qp, QpAttr, QpInitAttr};
use peerbuf::Errno;
use peerbuf::error::{SystemError, Unavailable};

/// Declares the functions to load from the library.
macro_rules! functions {
    ($($name:ident = $symbol:literal ($($argument:ty),*) -> $result:ty;)*) => {
        /// The library's functions. The library stays loaded until the process ends.
        pub(crate) struct Library {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) -> $result,)*
            /// Since rdma-core 34.
            pub(super) reg_dmabuf_mr: Option<RegDmabufMr>,
        }

        impl Library {
            fn load() -> Result<Library, String> {
                // SAFETY: initialising libibverbs reads its configuration and has no other effect
                // on this process.
                let library = unsafe { libloading::Library::new(NAME) }
                    .map_err(|error| error.to_string())?;
                // Never unloaded: a provider may have threads, and pointers into the library's code.
                let library = Box::leak(Box::new(library));
                // SAFETY: the symbols have the types of verbs.h.
                unsafe {
                    Ok(Library {
                        $($name: *library.get($symbol).map_err(|error| error.to_string())?,)*
                        reg_dmabuf_mr: library.get(b"ibv_reg_dmabuf_mr\0").ok().map(|f| *f),
                    })
                }
            }
        }
    };
}

type RegDmabufMr = unsafe extern "C" fn(*mut Pd, u64, usize, u64, c_int, c_int) -> *mut Mr;

functions! {
    get_device_list = b"ibv_get_device_list\0" (*mut c_int) -> *mut *mut c_void;
    free_device_list = b"ibv_free_device_list\0" (*mut *mut c_void) -> ();
    get_device_name = b"ibv_get_device_name\0" (*mut c_void) -> *const c_char;
    open_device = b"ibv_open_device\0" (*mut c_void) -> *mut Context;
    close_device = b"ibv_close_device\0" (*mut Context) -> c_int;
    query_port = b"ibv_query_port\0" (*mut Context, u8, *mut PortAttr) -> c_int;
    query_gid_table = b"_ibv_query_gid_table\0" (*mut Context, *mut GidEntry, usize, u32, usize) -> isize;
    alloc_pd = b"ibv_alloc_pd\0" (*mut Context) -> *mut Pd;
    dealloc_pd = b"ibv_dealloc_pd\0" (*mut Pd) -> c_int;
    reg_mr_iova2 = b"ibv_reg_mr_iova2\0" (*mut Pd, *mut c_void, usize, u64, c_uint) -> *mut Mr;
    dereg_mr = b"ibv_dereg_mr\0" (*mut Mr) -> c_int;
    create_comp_channel = b"ibv_create_comp_channel\0" (*mut Context) -> *mut CompChannel;
    destroy_comp_channel = b"ibv_destroy_comp_channel\0" (*mut CompChannel) -> c_int;
    create_cq = b"ibv_create_cq\0" (*mut Context, c_int, *mut c_void, *mut CompChannel, c_int) -> *mut Cq;
    destroy_cq = b"ibv_destroy_cq\0" (*mut Cq) -> c_int;
    get_cq_event = b"ibv_get_cq_event\0" (*mut CompChannel, *mut *mut Cq, *mut *mut c_void) -> c_int;
    ack_cq_events = b"ibv_ack_cq_events\0" (*mut Cq, c_uint) -> ();
    create_qp = b"ibv_create_qp\0" (*mut Pd, *mut QpInitAttr) -> *mut Qp;
    modify_qp = b"ibv_modify_qp\0" (*mut Qp, *mut QpAttr, c_int) -> c_int;
    destroy_qp = b"ibv_destroy_qp\0" (*mut Qp) -> c_int;
}

/// The library's file name.
pub(crate) const NAME: &str = "libibverbs.so.1";

/// The library, loaded at the first call.
///
/// # Errors The loader's message.
fn library() -> Result<&'static Library, &'static str> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    match LIBRARY.get_or_init(Library::load) {
        Ok(library) => Ok(library),
        Err(why) => Err(why),
    }
}

/// The feature that is missing without it.
pub(crate) const WHAT: &str = "RDMA";

/// The library, as an error if it cannot be loaded.
///
/// # Errors [`Unavailable`] with the loader's message.
pub(crate) fn needed() -> Result<&'static Library, Unavailable> {
    library().map_err(|why| {
        let cause = SystemError::new("dlopen", NAME, Errno::LIBACC);
        let remedy =
            format!("install rdma-core's libraries (libibverbs1, ibverbs-providers): {why}");
        Unavailable::new(WHAT, cause, remedy)
    })
}

/// `errno` after a call that returned a null pointer.
pub(super) fn last() -> Errno {
    Errno::from(&std::io::Error::last_os_error())
}

/// The result of a call that returns an error number.
pub(super) fn check(status: c_int) -> Result<(), Errno> {
    match status {
        0 => Ok(()),
        // Some functions return the number, others return -1 and set `errno`.
        -1 => Err(last()),
        number => Err(Errno(number.abs())),
    }
}

impl Library {
    /// Calls `each` for each device until it returns `Some`.
    pub(super) fn devices<T>(
        &self,
        mut each: impl FnMut(&str, *mut c_void) -> Option<T>,
    ) -> Result<Option<T>, Errno> {
        let mut count = 0;
        // SAFETY: the call fills in the count.
        let list = unsafe { (self.get_device_list)(&mut count) };
        if list.is_null() {
            return Err(last());
        }
        let mut found = None;
        for at in 0..usize::try_from(count).unwrap_or(0) {
            // SAFETY: the list has `count` entries, valid until it is freed.
            let device = unsafe { *list.add(at) };
            // SAFETY: a device's name is a string that lives as long as the device.
            let name = unsafe { CStr::from_ptr((self.get_device_name)(device)) };
            found = each(&name.to_string_lossy(), device);
            if found.is_some() {
                break;
            }
        }
        // SAFETY: this function owns the list, and a context keeps its device.
        unsafe { (self.free_device_list)(list) };
        Ok(found)
    }

    /// The names of the devices.
    pub(crate) fn names(&self) -> Result<Vec<String>, Errno> {
        let mut names = Vec::new();
        self.devices(|name, _| -> Option<()> {
            names.push(name.to_owned());
            None
        })?;
        Ok(names)
    }
}
