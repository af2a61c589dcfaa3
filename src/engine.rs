//! An export's engine without its mount, for what runs without a kernel: one
//! queue over any transport, in tests (rig.rs) and benchmarks (bench.rs).

use std::rc::Rc;
use std::sync::Arc;

use crate::control::{Control, Latch, Owned};
use crate::driver::BlockDriver;
use crate::file::{File, FilePolicy};
use crate::forward::Port;
use crate::operations::{Device, serve};
use crate::queue::Queue;
use crate::stats::AllStats;
use crate::task::Tasks;
use crate::transport::Transport;
use crate::wakeups::Wakeups;

/// A queue with its tasks, and the export and the file that it serves.
pub(crate) fn engine<D: BlockDriver, T: Transport>(
    driver: D,
    transport: T,
    growable: bool,
) -> (Queue<T>, Arc<Control>, Arc<File>) {
    let length = driver.length().expect("the driver's length");
    let driver = Arc::new(Owned::new(driver, Arc::new(Latch::default())));
    let control = Arc::new(Control::new("engine".to_owned(), driver.clone(), 1));
    let wakeups = Arc::new(Wakeups::new(transport.slots()).expect("an eventfd"));
    control.set_queues([wakeups.clone()].into());
    let policy = FilePolicy {
        writable: true,
        growable,
        others: true,
        uid: 0,
        gid: 0,
        block_size: 4096,
    };
    let file = Arc::new(File::new(policy, length, 1));
    // As after the look at the attributes that comes before an open.
    file.tell(length);
    file.publish();
    let port = Rc::new(Port::default());
    let device = Rc::new(Device {
        driver,
        file: file.clone(),
        stats: Arc::new(AllStats::new(1)),
        queue: 0,
        port: port.clone(),
    });
    let tasks = Tasks::new(wakeups.clone(), move |task, mailbox| {
        serve(device.clone(), task, mailbox)
    });
    let queue = Queue::new(0, control.clone(), wakeups, transport, tasks, port);
    (queue, control, file)
}
