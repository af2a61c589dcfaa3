//! Names the shared library, has the daemon offer the C API to its plugins, and
//! generates the C header into OUT_DIR.

use std::env;
use std::path::PathBuf;

const SOURCES: [&str; 7] = [
    "src/capi.rs",
    "src/capi/driver.rs",
    "src/capi/error.rs",
    "src/capi/log.rs",
    "src/capi/queue.rs",
    "src/capi/request.rs",
    "src/capi/stats.rs",
];

fn main() {
    // cargo-c turns on "capi" and gives the linker the same name.
    if env::var_os("CARGO_FEATURE_CAPI").is_none() {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libblkfuse.so.0");
    }
    println!("cargo:rustc-link-arg-bin=blkfused=-Wl,--export-dynamic-symbol=blkfuse_*");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=cbindgen.toml");
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by Cargo"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by Cargo"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml"));
    let mut builder = cbindgen::Builder::new()
        .with_config(config.expect("cbindgen.toml is well-formed"))
        .with_after_include(version_macros());
    for source in SOURCES {
        println!("cargo:rerun-if-changed={source}");
        builder = builder.with_src(root.join(source));
    }
    let header = builder
        .generate()
        .expect("the C API's sources are parsable");
    header.write_to_file(out.join("blkfuse.h"));
}

fn version_macros() -> String {
    let part = |name: &str| env::var(format!("CARGO_PKG_VERSION_{name}")).expect("set by Cargo");
    format!(
        "\n#define BLKFUSE_VERSION_MAJOR {}\n#define BLKFUSE_VERSION_MINOR {}\n\
         #define BLKFUSE_VERSION_PATCH {}\n\
         /** The header's version, as blkfuse_version() tells the library's. */\n\
         #define BLKFUSE_VERSION (BLKFUSE_VERSION_MAJOR << 16 | BLKFUSE_VERSION_MINOR << 8 | \\\n\
         \x20                       BLKFUSE_VERSION_PATCH)",
        part("MAJOR"),
        part("MINOR"),
        part("PATCH")
    )
}
