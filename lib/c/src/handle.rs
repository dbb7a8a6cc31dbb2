//! Handles of objects for C.
//!
//! If a handle were an address, a double free or a use after free would be undefined behaviour. Here a handle
//! is a number that is never reused, in a table of all objects.

use std::any::Any;
use std::collections::HashMap;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use crate::failure::{Code, Failure};

type Object = Arc<dyn Any + Send + Sync>;

static OBJECTS: LazyLock<Mutex<HashMap<usize, Object>>> = LazyLock::new(Mutex::default);

fn objects() -> MutexGuard<'static, HashMap<usize, Object>> {
    OBJECTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An unused number that is unlikely to be an address. Multiplying the count by an odd number scatters it
/// without repeating a number.
fn number() -> usize {
    static COUNT: AtomicUsize = AtomicUsize::new(1);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    count.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Keeps an object until [`free`].
pub(crate) fn keep<T: Send + Sync + 'static>(object: T) -> *mut T {
    let number = number();
    objects().insert(number, Arc::new(object));
    ptr::without_provenance_mut(number)
}

/// The object of a handle. It lives until the end of the call, even if another thread frees it meanwhile.
pub(crate) fn get<T: Send + Sync + 'static>(handle: *const T) -> Result<Arc<T>, Failure> {
    let object = objects().get(&handle.addr()).cloned();
    typed(object, handle)
}

/// Frees a handle. Null does nothing.
pub(crate) fn free<T: Send + Sync + 'static>(handle: *mut T) -> Result<(), Failure> {
    if handle.is_null() {
        return Ok(());
    }
    let object = {
        let mut objects = objects();
        typed(objects.get(&handle.addr()).cloned(), handle)?;
        objects.remove(&handle.addr())
    };
    // Dropped with the table unlocked: the drop may wait for one of the object's threads.
    drop(object);
    Ok(())
}

fn typed<T: Send + Sync + 'static>(
    object: Option<Object>,
    handle: *const T,
) -> Result<Arc<T>, Failure> {
    let wanted = std::any::type_name::<T>();
    let wanted = wanted.rsplit("::").next().unwrap_or(wanted).to_lowercase();
    let refuse = |what: &str| {
        let message = format!("{handle:p} is {what}, where a peerbuf_{wanted} was expected");
        Failure::new(Code::Handle, message)
    };
    if handle.is_null() {
        return Err(refuse("null"));
    }
    let object = object.ok_or_else(|| refuse("no handle, or was freed"))?;
    object
        .downcast()
        .map_err(|_| refuse("a handle of another type"))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Apple(u32);
    struct Pear;

    #[test]
    fn a_handle_is_good_until_it_is_freed_and_for_its_type_only() {
        let apple = keep(Apple(7));
        let kept = get(apple).unwrap();
        assert_eq!(kept.0, 7);
        let code = |failure: Failure| failure.code;
        assert_eq!(
            get(apple.cast::<Pear>()).err().map(code),
            Some(Code::Handle)
        );
        assert_eq!(
            free(apple.cast::<Pear>()).err().map(code),
            Some(Code::Handle)
        );
        free(apple).unwrap();
        assert_eq!(get(apple).err().map(code), Some(Code::Handle));
        assert_eq!(free(apple).err().map(code), Some(Code::Handle));
        let next = keep(Apple(8));
        assert_ne!(next, apple);
        assert!(get(apple).is_err());
        assert_eq!(kept.0, 7);
        free(next).unwrap();
        for nonsense in [usize::MAX, 1, 0x7fff_0000_1000] {
            assert!(get(ptr::without_provenance::<Apple>(nonsense)).is_err());
        }
        assert!(get(ptr::null::<Apple>()).is_err());
        free(ptr::null_mut::<Apple>()).unwrap();
    }
}
