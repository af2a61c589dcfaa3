//! A program that a test runs beside itself.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::within;

/// A program that runs; killed and waited for if the test fails before.
pub struct Running {
    child: Child,
    input: Option<ChildStdin>,
    lines: mpsc::Receiver<String>,
}

impl Running {
    /// Its input is the test's to write, if the command says that it is piped.
    pub fn start(command: &mut Command) -> Self {
        let spawned = command.stdout(Stdio::piped()).spawn();
        let mut child = spawned.unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let output = BufReader::new(child.stdout.take().unwrap());
        let (send, lines) = mpsc::channel();
        // Ends with the program's output.
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let _ = send.send(line);
            }
        });
        Self {
            input: child.stdin.take(),
            child,
            lines,
        }
    }

    /// Waits for the next line that it prints.
    pub fn line(&self, limit: Duration) -> String {
        self.lines
            .recv_timeout(limit)
            .expect("the program prints a line")
    }

    /// Writes a line to its input.
    pub fn tell(&mut self, line: &str) {
        let input = self.input.as_mut().expect("its input is open");
        writeln!(input, "{line}").unwrap();
    }

    /// Ends its input.
    pub fn end_input(&mut self) {
        self.input = None;
    }

    pub fn signal(&self, number: i32) {
        // SAFETY: kill touches no memory; the child was not waited for yet,
        // so its number is still its own.
        let result = unsafe { libc::kill(self.child.id() as i32, number) };
        assert_eq!(result, 0);
    }

    pub fn status(&mut self, limit: Duration) -> ExitStatus {
        let mut status = None;
        within(limit, "the program ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            // Its connection ends with it, so it does not stay in the kernel.
            let _ = self.child.wait();
        }
    }
}
