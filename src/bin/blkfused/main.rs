//! blkfused: exports disk images as files.

mod backend;
mod cli;
mod demo;
mod direct;
mod events;
mod failure;
mod image;
mod lock;
#[cfg(test)]
mod manual;
mod null;
mod passed_fd;
mod plugin;
mod probe;
mod ram;
mod raw;
mod serve;
mod signals;
mod size;
#[cfg(test)]
mod testing;

use std::io::Write;
use std::process::ExitCode;

use log::{Level, LevelFilter};

use crate::cli::Wish;
use crate::demo::Demo;
use crate::failure::{Failure, Result};
use crate::signals::Signals;

fn main() -> ExitCode {
    let demo = std::env::args_os().len() <= 1;
    let wish = if demo { None } else { Some(cli::parse()) };
    match wish.transpose() {
        Err(failure) => {
            complain(&failure);
            ExitCode::from(2)
        }
        Ok(wish) => match run(wish) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(failure) => {
                complain(&failure);
                ExitCode::FAILURE
            }
        },
    }
}

/// Does what is wished, or the demonstration; true if nothing went wrong on the
/// way.
fn run(wish: Option<Wish>) -> Result<bool> {
    // Before any thread is started.
    let signals = Signals::take_over().map_err(|errno| Failure::io("signalfd", &errno.into()))?;
    match wish {
        Some(Wish::Export(config)) => {
            start_log(config.log_level);
            serve::serve(&config, &signals, None)
        }
        Some(Wish::PluginHelp(file)) => {
            let help = plugin::help(&file)?;
            // Nobody has to listen.
            let _ = std::io::stdout().write_all(help.as_bytes());
            Ok(true)
        }
        None => {
            let demo = Demo::create()?;
            let config = demo.config();
            start_log(config.log_level);
            serve::serve(&config, &signals, Some(&demo.hints()))
        }
    }
}

/// Puts the log on standard error, in the form of every other message.
fn start_log(level: LevelFilter) {
    env_logger::Builder::new()
        .filter_level(level)
        .format(|out, record| match record.level() {
            Level::Error | Level::Info => writeln!(out, "blkfused: {}", record.args()),
            Level::Warn => writeln!(out, "blkfused: warning: {}", record.args()),
            Level::Debug | Level::Trace => {
                writeln!(out, "blkfused: [{}] {}", record.target(), record.args())
            }
        })
        .init();
}

/// Says what went wrong, if standard error still leads anywhere.
fn complain(failure: &Failure) {
    let _ = writeln!(std::io::stderr(), "blkfused: {failure}");
}
