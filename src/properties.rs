//! The properties: an export's settings and facts by name.
//!
//! One typed table. It feeds the C API, names the daemon's options, and is
//! what the header's and README's lists are checked against.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use crate::config::{Config, IoUring, QUEUES_LIMIT, Threads, check_depth, check_request};
use crate::error::{Error, Result};
use crate::export::{Export, State};
use crate::mount::AllowOther;

/// A property's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Value {
    Bool(bool),
    U64(u64),
    Str(OsString),
}

/// A property's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Bool,
    U64,
    Str,
}

/// Where a property's value is looked up.
pub(crate) struct View<'a> {
    pub(crate) config: &'a Config,
    /// Once it has started.
    pub(crate) export: Option<&'a Export>,
}

type Setter = fn(&mut Config, Value) -> Result<()>;
type Getter = fn(&View<'_>) -> Option<Value>;

/// One property.
pub(crate) struct Property {
    pub(crate) key: &'static str,
    pub(crate) kind: Kind,
    /// `None`: it only reports. Otherwise it can be set until the start.
    set: Option<Setter>,
    /// `None` from it: not known before the start.
    get: Getter,
}

/// All of them, in the order of the documentation.
pub(crate) static PROPERTIES: &[Property] = &[
    Property {
        key: "mountpoint",
        kind: Kind::Str,
        set: Some(|config, value| {
            config.mountpoint = Some(text(value)?.into());
            Ok(())
        }),
        get: |view| {
            let path = view.config.mountpoint.clone();
            Some(Value::Str(path.unwrap_or_default().into()))
        },
    },
    Property {
        key: "fuse-fd",
        kind: Kind::U64,
        set: Some(|config, value| {
            let number = i32::try_from(number(value)?);
            config.fuse_fd = Some(number.map_err(|_| invalid("is no file descriptor"))?);
            Ok(())
        }),
        get: |view| view.config.fuse_fd.map(|fd| Value::U64(fd as u64)),
    },
    Property {
        key: "source",
        kind: Kind::Str,
        set: Some(|config, value| {
            config.source = Some(text(value)?);
            Ok(())
        }),
        get: |view| Some(Value::Str(view.config.source())),
    },
    Property {
        key: "writable",
        kind: Kind::Bool,
        set: Some(|config, value| {
            config.writable = boolean(value)?;
            Ok(())
        }),
        get: |view| Some(Value::Bool(view.config.writable)),
    },
    Property {
        key: "growable",
        kind: Kind::Bool,
        set: Some(|config, value| {
            config.growable = boolean(value)?;
            Ok(())
        }),
        get: |view| Some(Value::Bool(view.config.growable)),
    },
    Property {
        key: "passthrough",
        kind: Kind::Bool,
        set: Some(|config, value| {
            config.passthrough = boolean(value)?;
            Ok(())
        }),
        get: |view| Some(Value::Bool(view.config.passthrough)),
    },
    Property {
        key: "allow-other",
        kind: Kind::Str,
        set: Some(|config, value| {
            config.allow_other = match text(value)?.as_bytes() {
                b"off" => AllowOther::Off,
                b"on" => AllowOther::On,
                b"auto" => AllowOther::Auto,
                _ => return Err(invalid("is none of on, off and auto")),
            };
            Ok(())
        }),
        get: |view| {
            let word = match (view.export, view.config.allow_other) {
                // What came of it.
                (Some(export), _) if export.allows_others() => "on",
                (Some(_), _) | (None, AllowOther::Off) => "off",
                (None, AllowOther::On) => "on",
                (None, AllowOther::Auto) => "auto",
            };
            Some(Value::Str(word.into()))
        },
    },
    Property {
        key: "queues",
        kind: Kind::U64,
        set: Some(|config, value| {
            let queues = number(value)?;
            if queues > QUEUES_LIMIT {
                return Err(invalid("is more than 256"));
            }
            config.queues = queues as usize;
            Ok(())
        }),
        get: |view| {
            let queues = view.export.map_or(view.config.queues, Export::queue_count);
            Some(Value::U64(queues as u64))
        },
    },
    Property {
        key: "threads",
        kind: Kind::Str,
        set: Some(|config, value| {
            config.threads = match text(value)?.as_bytes() {
                b"library" => Threads::Library,
                b"host" => Threads::Host,
                _ => return Err(invalid("is neither library nor host")),
            };
            Ok(())
        }),
        get: |view| {
            let word = match view.config.threads {
                Threads::Library => "library",
                Threads::Host => "host",
            };
            Some(Value::Str(word.into()))
        },
    },
    Property {
        key: "io-uring",
        kind: Kind::Str,
        set: Some(|config, value| {
            config.io_uring = match text(value)?.as_bytes() {
                b"off" => IoUring::Off,
                b"on" => IoUring::On,
                b"auto" => IoUring::Auto,
                _ => return Err(invalid("is none of on, off and auto")),
            };
            Ok(())
        }),
        get: |view| {
            let word = match view.config.io_uring {
                IoUring::Off => "off",
                IoUring::On => "on",
                IoUring::Auto => "auto",
            };
            Some(Value::Str(word.into()))
        },
    },
    Property {
        key: "queue-depth",
        kind: Kind::U64,
        set: Some(|config, value| {
            let depth = number(value)?;
            check_depth(depth).map_err(invalid)?;
            config.queue_depth = Some(depth as usize);
            Ok(())
        }),
        get: |view| {
            let asked = view.config.queue_depth;
            let depth = view.export.map_or(asked, Export::queue_depth)?;
            Some(Value::U64(depth as u64))
        },
    },
    Property {
        key: "max-request",
        kind: Kind::U64,
        set: Some(|config, value| {
            let bytes = number(value)?;
            check_request(bytes).map_err(invalid)?;
            config.max_request = Some(bytes as u32);
            Ok(())
        }),
        get: |view| {
            let asked = view.config.max_request();
            let bytes = view.export.map_or(asked, Export::max_request);
            Some(Value::U64(bytes.into()))
        },
    },
    Property {
        key: "memory-budget",
        kind: Kind::U64,
        set: Some(|config, value| {
            config.memory_budget = Some(number(value)?);
            Ok(())
        }),
        get: |view| Some(Value::U64(view.config.memory_budget())),
    },
    Property {
        key: "state",
        kind: Kind::Str,
        set: None,
        get: |view| {
            let word = match view.export.map(Export::state) {
                None => "created",
                Some(State::Started) => "started",
                Some(State::Stopping) => "stopping",
                Some(State::Ended) => "ended",
            };
            Some(Value::Str(word.into()))
        },
    },
    Property {
        key: "transport",
        kind: Kind::Str,
        set: None,
        get: |view| Some(Value::Str(view.export?.transport().into())),
    },
    Property {
        key: "protocol",
        kind: Kind::Str,
        set: None,
        get: |view| {
            let minor = view.export?.protocol_minor();
            Some(Value::Str(format!("7.{minor}").into()))
        },
    },
    Property {
        key: "mount-method",
        kind: Kind::Str,
        set: None,
        get: |view| {
            let method = view.export?.mount_method().unwrap_or("fuse-fd");
            Some(Value::Str(method.into()))
        },
    },
    Property {
        key: "last-error",
        kind: Kind::Str,
        set: None,
        get: |view| {
            let failure = view.export.and_then(Export::failure);
            let message = failure.map(|e| e.message().to_owned());
            Some(Value::Str(message.unwrap_or_default().into()))
        },
    },
];

fn invalid(text: &str) -> Error {
    Error::new(libc::EINVAL, text)
}

fn boolean(value: Value) -> Result<bool> {
    match value {
        Value::Bool(value) => Ok(value),
        _ => Err(invalid("is a bool")),
    }
}

fn number(value: Value) -> Result<u64> {
    match value {
        Value::U64(value) => Ok(value),
        _ => Err(invalid("is a number")),
    }
}

fn text(value: Value) -> Result<OsString> {
    match value {
        Value::Str(value) => Ok(value),
        _ => Err(invalid("is a string")),
    }
}

fn find(key: &str) -> Result<&'static Property> {
    PROPERTIES.iter().find(|p| p.key == key).ok_or_else(|| {
        let known: Vec<_> = PROPERTIES.iter().map(|p| p.key).collect();
        let text = format!("no property \"{key}\"; there are {}", known.join(", "));
        Error::new(libc::ENOENT, text)
    })
}

fn named(key: &str, error: Error) -> Error {
    Error::new(error.errno(), format!("\"{key}\" {error}"))
}

/// Sets a property; a string is taken for any type.
pub(crate) fn set(config: &mut Config, key: &str, value: Value) -> Result<()> {
    let property = find(key)?;
    let Some(set) = property.set else {
        return Err(named(key, Error::new(libc::EPERM, "cannot be set")));
    };
    let value = match value {
        Value::Str(text) => parse(property.kind, text).map_err(|e| named(key, e))?,
        other => other,
    };
    set(config, value).map_err(|e| named(key, e))
}

fn parse(kind: Kind, text: OsString) -> Result<Value> {
    match kind {
        Kind::Str => Ok(Value::Str(text)),
        Kind::Bool => match text.as_bytes() {
            b"on" | b"true" | b"yes" | b"1" => Ok(Value::Bool(true)),
            b"off" | b"false" | b"no" | b"0" => Ok(Value::Bool(false)),
            _ => Err(invalid("is a bool: on or off")),
        },
        Kind::U64 => parse_number(&text).map(Value::U64),
    }
}

fn parse_number(text: &OsStr) -> Result<u64> {
    let number = text.to_str().and_then(|t| t.parse().ok());
    number.ok_or_else(|| invalid("is a number"))
}

/// A property's value.
pub(crate) fn get(view: &View<'_>, key: &str) -> Result<Value> {
    let property = find(key)?;
    (property.get)(view)
        .ok_or_else(|| named(key, Error::new(libc::ENODATA, "has no value at this time")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(config: &Config) -> View<'_> {
        View {
            config,
            export: None,
        }
    }

    #[test]
    fn what_is_set_is_what_is_got() {
        let mut config = Config::default();
        set(&mut config, "writable", Value::Bool(true)).unwrap();
        set(&mut config, "queues", Value::Str("3".into())).unwrap();
        set(&mut config, "allow-other", Value::Str("off".into())).unwrap();
        set(&mut config, "mountpoint", Value::Str("/a b".into())).unwrap();
        set(&mut config, "io-uring", Value::Str("on".into())).unwrap();
        set(&mut config, "queue-depth", Value::U64(1024)).unwrap();
        set(&mut config, "max-request", Value::U64(69_632)).unwrap();
        set(&mut config, "memory-budget", Value::Str("1000".into())).unwrap();
        let got = |key| get(&view(&config), key).unwrap();
        assert_eq!(got("writable"), Value::Bool(true));
        assert_eq!(got("queues"), Value::U64(3));
        assert_eq!(got("allow-other"), Value::Str("off".into()));
        assert_eq!(got("mountpoint"), Value::Str("/a b".into()));
        assert_eq!(got("io-uring"), Value::Str("on".into()));
        assert_eq!(got("queue-depth"), Value::U64(1024));
        assert_eq!(got("max-request"), Value::U64(69_632));
        assert_eq!(got("memory-budget"), Value::U64(1000));
        assert_eq!(got("state"), Value::Str("created".into()));
    }

    #[test]
    fn what_is_not_set_has_its_default() {
        let config = Config::default();
        let got = |key| get(&view(&config), key);
        assert_eq!(got("io-uring"), Ok(Value::Str("auto".into())));
        assert_eq!(got("max-request"), Ok(Value::U64(1 << 20)));
        assert_eq!(got("memory-budget"), Ok(Value::U64(256 << 20)));
        // As the budget allows, which shows at the start.
        assert_eq!(got("queue-depth").unwrap_err().errno(), libc::ENODATA);
    }

    #[test]
    fn every_kind_of_bad_input_says_what_is_wrong() {
        let mut config = Config::default();
        let mut refused = |key, value| {
            let error = set(&mut config, key, value).unwrap_err();
            assert!(error.message().contains(key), "{error}");
            error.errno()
        };
        assert_eq!(refused("colour", Value::U64(1)), libc::ENOENT);
        assert_eq!(refused("writable", Value::U64(1)), libc::EINVAL);
        assert_eq!(
            refused("writable", Value::Str("maybe".into())),
            libc::EINVAL
        );
        assert_eq!(refused("queues", Value::Str("-1".into())), libc::EINVAL);
        assert_eq!(refused("queues", Value::U64(257)), libc::EINVAL);
        assert_eq!(refused("queues", Value::Bool(true)), libc::EINVAL);
        assert_eq!(refused("fuse-fd", Value::U64(u64::MAX)), libc::EINVAL);
        assert_eq!(refused("io-uring", Value::Str("yes".into())), libc::EINVAL);
        assert_eq!(refused("io-uring", Value::Bool(true)), libc::EINVAL);
        for depth in [0, 1025, 1 << 32] {
            assert_eq!(refused("queue-depth", Value::U64(depth)), libc::EINVAL);
        }
        for bytes in [0, 4096, 65_535, 65_537, 2 << 20, (1 << 32) + 65_536] {
            assert_eq!(refused("max-request", Value::U64(bytes)), libc::EINVAL);
        }
        assert_eq!(
            refused("max-request", Value::Str("1M".into())),
            libc::EINVAL
        );
        assert_eq!(refused("memory-budget", Value::Bool(true)), libc::EINVAL);
        assert_eq!(refused("state", Value::Str("started".into())), libc::EPERM);
        let not_yet = get(&view(&config), "protocol").unwrap_err();
        assert_eq!(not_yet.errno(), libc::ENODATA);
    }
}
