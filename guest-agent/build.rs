//! Leaves the tables for unwinding out of the static binary, see `link.x`.

fn main() {
    println!("cargo:rerun-if-changed=link.x");
    let is =
        |name: &str, value: &str| std::env::var(name).is_ok_and(|found| found.split(',').any(|found| found == value));
    // The profile `agent`, the only one that optimises for size; build scripts are not told of `panic`.
    let agent = is("OPT_LEVEL", "z") && is("CARGO_CFG_TARGET_OS", "linux");
    if agent && is("CARGO_CFG_TARGET_FEATURE", "crt-static") {
        let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("link.x");
        println!("cargo:rustc-link-arg-bins=-Wl,-T,{}", script.display());
        println!("cargo:rustc-link-arg-bins=-Wl,--no-eh-frame-hdr");
    }
}
