//! What threads meet by, for the code whose meetings are proved: gate.rs,
//! wakeups.rs and capi/request.rs.
//!
//! In a build with `--cfg loom` these are loom's, and the models beside that
//! code try the orders in which threads can take their steps (all with up to so
//! many preemptions) and the values that the memory model lets them see:
//!
//! ```sh
//! RUSTFLAGS='--cfg loom' LOOM_MAX_PREEMPTIONS=3 \
//!     cargo test --release --lib --target-dir target/loom model
//! ```

#[cfg(loom)]
pub(crate) use self::modelled::*;
#[cfg(not(loom))]
pub(crate) use self::real::*;

#[cfg(not(loom))]
mod real {
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};

    pub(crate) use nix::sys::eventfd::EventFd;
    pub(crate) use parking_lot::{Condvar, Mutex};

    /// The standard one, with loom's way to get at what is inside.
    #[derive(Debug, Default)]
    pub(crate) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

    impl<T> UnsafeCell<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(value.into())
        }

        pub(crate) fn with<R>(&self, look: impl FnOnce(*const T) -> R) -> R {
            look(self.0.get())
        }

        pub(crate) fn with_mut<R>(&self, change: impl FnOnce(*mut T) -> R) -> R {
            change(self.0.get())
        }
    }
}

#[cfg(loom)]
mod modelled {
    //! loom's parts in the shape of the real ones.

    use std::ops::{Deref, DerefMut};
    use std::os::fd::{AsFd, BorrowedFd};
    use std::sync::atomic::Ordering::{self, *};
    use std::time::{Duration, Instant};

    pub(crate) use loom::cell::UnsafeCell;
    use loom::sync::{WaitTimeoutResult, atomic};
    use nix::errno::Errno;
    use nix::sys::eventfd::EfdFlags;

    /// loom takes `SeqCst` for `AcqRel`. What is lacking is the one order of
    /// all `SeqCst` accesses: such a load sees the newest store if that was
    /// `SeqCst`, too. In a model a read-modify-write sees the newest value.
    macro_rules! atomic {
        ($name:ident($value:ty) $($change:ident)*) => {
            #[derive(Debug)]
            pub(crate) struct $name {
                atomic: atomic::$name,
                /// Whether the newest store was `SeqCst`.
                ordered: std::sync::atomic::AtomicBool,
            }

            impl $name {
                pub(crate) fn new(value: $value) -> Self {
                    Self {
                        atomic: atomic::$name::new(value),
                        ordered: true.into(),
                    }
                }

                fn stored<R>(&self, order: Ordering, result: R) -> R {
                    self.ordered.store(order == SeqCst, Relaxed);
                    result
                }

                pub(crate) fn load(&self, order: Ordering) -> $value {
                    if order == SeqCst && self.ordered.load(Relaxed) {
                        return self.atomic.fetch_or(<$value>::default(), Acquire);
                    }
                    self.atomic.load(order)
                }

                #[allow(dead_code, reason = "some are only counted")]
                pub(crate) fn store(&self, value: $value, order: Ordering) {
                    if order == SeqCst {
                        self.atomic.swap(value, Release);
                    } else {
                        self.atomic.store(value, order);
                    }
                    self.stored(order, ());
                }

                $(pub(crate) fn $change(&self, value: $value, order: Ordering) -> $value {
                    self.stored(order, self.atomic.$change(value, order))
                })*
            }

            impl Default for $name {
                fn default() -> Self {
                    Self::new(<$value>::default())
                }
            }
        };
    }

    atomic!(AtomicBool(bool) swap);
    atomic!(AtomicU64(u64) swap fetch_or);
    atomic!(AtomicUsize(usize) fetch_add fetch_sub);

    impl AtomicU64 {
        pub(crate) fn compare_exchange(
            &self,
            current: u64,
            new: u64,
            success: Ordering,
            failure: Ordering,
        ) -> Result<u64, u64> {
            let before = self
                .atomic
                .compare_exchange(current, new, success, failure)?;
            self.stored(success, Ok(before))
        }

        pub(crate) fn compare_exchange_weak(
            &self,
            current: u64,
            new: u64,
            success: Ordering,
            failure: Ordering,
        ) -> Result<u64, u64> {
            self.compare_exchange(current, new, success, failure)
        }
    }

    impl AtomicUsize {
        pub(crate) fn fetch_update(
            &self,
            set: Ordering,
            fetch: Ordering,
            change: impl FnMut(usize) -> Option<usize>,
        ) -> Result<usize, usize> {
            let before = self.atomic.fetch_update(set, fetch, change)?;
            self.stored(set, Ok(before))
        }
    }

    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

    /// Empty only while a condition variable has the lock.
    pub(crate) struct MutexGuard<'a, T>(Option<loom::sync::MutexGuard<'a, T>>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            MutexGuard(Some(self.0.lock().unwrap()))
        }
    }

    impl<T> Deref for MutexGuard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            self.0.as_ref().unwrap()
        }
    }

    impl<T> DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.0.as_mut().unwrap()
        }
    }

    #[derive(Debug, Default)]
    pub(crate) struct Condvar(loom::sync::Condvar);

    impl Condvar {
        pub(crate) fn new() -> Self {
            Self::default()
        }

        pub(crate) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
            let lock = guard.0.take().unwrap();
            guard.0 = Some(self.0.wait(lock).unwrap());
        }

        /// There is no time in a model: the deadline never comes.
        pub(crate) fn wait_until<T>(
            &self,
            guard: &mut MutexGuard<'_, T>,
            _deadline: Instant,
        ) -> WaitTimeoutResult {
            let lock = guard.0.take().unwrap();
            let (lock, result) = self.0.wait_timeout(lock, Duration::MAX).unwrap();
            guard.0 = Some(lock);
            result
        }

        pub(crate) fn notify_all(&self) {
            self.0.notify_all();
        }
    }

    /// An eventfd without a kernel: a counter.
    #[derive(Debug)]
    pub(crate) struct EventFd {
        counter: Mutex<u64>,
        readable: Condvar,
    }

    impl EventFd {
        pub(crate) fn from_value_and_flags(value: u32, _: EfdFlags) -> nix::Result<Self> {
            Ok(Self {
                counter: Mutex::new(value.into()),
                readable: Condvar::new(),
            })
        }

        pub(crate) fn write(&self, value: u64) -> nix::Result<usize> {
            *self.counter.lock() += value;
            self.readable.notify_all();
            Ok(size_of::<u64>())
        }

        pub(crate) fn read(&self) -> nix::Result<u64> {
            match std::mem::take(&mut *self.counter.lock()) {
                0 => Err(Errno::EAGAIN),
                value => Ok(value),
            }
        }

        /// What poll() does with a descriptor.
        #[cfg(test)]
        pub(crate) fn poll(&self) {
            let mut counter = self.counter.lock();
            while *counter == 0 {
                self.readable.wait(&mut counter);
            }
        }
    }

    impl AsFd for EventFd {
        fn as_fd(&self) -> BorrowedFd<'_> {
            panic!("a model has no descriptors");
        }
    }
}
