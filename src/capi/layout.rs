//! The test that C and Rust agree on the layout of what they share.

use std::fmt::Write as _;
use std::io::Write as _;
use std::mem::offset_of;
use std::process::{Command, Stdio};

use super::driver::{blkfuse_driver_ops, blkfuse_limits};
use super::request::blkfuse_extent;
use super::stats::{blkfuse_op_stats, blkfuse_stats};

/// C's assertions that a struct has the size, and every member the place and
/// size, that Rust gives it. Members that are not listed do not compile.
macro_rules! assertions {
    ($text:expr, $name:ident { $($member:ident),* }) => {
        let size_of_member = |s: &$name| {
            let $name { $($member),* } = s;
            [$(size_of_val($member)),*]
        };
        // SAFETY: all of these are made of integers and nullable pointers,
        // for which zeroes are valid.
        let sizes = size_of_member(&unsafe { std::mem::zeroed() });
        let members = [$((stringify!($member), offset_of!($name, $member))),*];
        let name = stringify!($name);
        let (size, align) = (size_of::<$name>(), align_of::<$name>());
        writeln!(
            $text,
            "CHECK(sizeof(struct {name}) == {size});\nCHECK(_Alignof(struct {name}) == {align});"
        ).unwrap();
        for ((member, offset), size) in members.into_iter().zip(sizes) {
            writeln!(
                $text,
                "CHECK(offsetof(struct {name}, {member}) == {offset});\n\
                 CHECK(sizeof(((struct {name} *)0)->{member}) == {size});"
            ).unwrap();
        }
    };
}

#[test]
fn c_sees_the_same_structs() {
    let mut text = String::from(
        "#include <blkfuse.h>\n#define CHECK(what) _Static_assert(what, \"of the ABI\")\n",
    );
    assertions!(
        text,
        blkfuse_limits {
            struct_size,
            block_size,
            reserved
        }
    );
    assertions!(
        text,
        blkfuse_extent {
            bytes,
            flags,
            reserved
        }
    );
    assertions!(
        text,
        blkfuse_driver_ops {
            struct_size,
            api_version,
            request_ctx_size,
            length,
            allocated_size,
            limits,
            read,
            write,
            flush,
            discard,
            write_zeroes,
            truncate,
            block_status,
            queue_start,
            queue_stop,
            batch_begin,
            batch_end,
            idle,
            event,
            deleted,
            backing_fd
        }
    );
    assertions!(
        text,
        blkfuse_op_stats {
            operations,
            bytes,
            errors
        }
    );
    assertions!(
        text,
        blkfuse_stats {
            read,
            write,
            flush,
            allocate,
            other,
            in_flight,
            latency
        }
    );
    // What exists so far must stay where it is, whatever is added.
    if cfg!(target_pointer_width = "64") {
        text.push_str(
            "CHECK(sizeof(struct blkfuse_limits) == 16);\n\
             CHECK(sizeof(struct blkfuse_extent) == 16);\n\
             CHECK(sizeof(struct blkfuse_driver_ops) >= 160);\n\
             CHECK(offsetof(struct blkfuse_driver_ops, deleted) == 144);\n\
             CHECK(offsetof(struct blkfuse_driver_ops, backing_fd) == 152);\n\
             CHECK(sizeof(struct blkfuse_op_stats) == 24);\n\
             CHECK(sizeof(struct blkfuse_stats) >= 384);\n\
             CHECK(offsetof(struct blkfuse_stats, latency) == 128);\n",
        );
    }
    for compiler in ["gcc", "clang"] {
        let spawned = Command::new(compiler)
            .args(["-std=c11", "-fsyntax-only", "-xc", "-", "-I"])
            .arg(env!("OUT_DIR"))
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let Ok(mut child) = spawned else {
            assert!(
                std::env::var_os("BLKFUSE_NO_SKIP").is_none(),
                "skipped, which BLKFUSE_NO_SKIP forbids: there is no {compiler}"
            );
            eprintln!("SKIPPED: there is no {compiler}");
            continue;
        };
        let mut input = child.stdin.take().unwrap();
        input.write_all(text.as_bytes()).unwrap();
        drop(input);
        let output = child.wait_with_output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{compiler}: {errors}\n{text}");
    }
}
