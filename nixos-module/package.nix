# `pika-guest`: one static program, built from Cargo.lock without a network. The target is glibc's, as it is for every other image,
# so that there is one binary to know.
{
  lib,
  rustPlatform,
  glibc,
  binutils,
}:
let
  inherit (lib) fileset;
  workspace = lib.importTOML ../Cargo.toml;
in
rustPlatform.buildRustPackage {
  pname = "pika-guest";
  inherit (workspace.workspace.package) version;

  # Cargo reads the manifests of all members, whichever is built.
  src = fileset.toSource {
    root = ../.;
    fileset = fileset.unions [
      ../Cargo.toml
      ../Cargo.lock
      ../common
      ../guest-agent
      ../host-collector
      ../tests
    ];
  };
  cargoLock.lockFile = ../Cargo.lock;

  # Alone, so that no other package's features get into it.
  cargoBuildFlags = [
    "--package"
    "pika-guest-agent"
  ];
  buildType = "agent";
  env.RUSTFLAGS = "-C target-feature=+crt-static";
  buildInputs = [ glibc.static ];

  # The tests start containers and virtual machines: `cargo xtask test`.
  doCheck = false;

  doInstallCheck = true;
  nativeInstallCheckInputs = [ binutils ];
  installCheckPhase = ''
    runHook preInstallCheck
    $out/bin/pika-guest --version
    if readelf --program-headers --wide $out/bin/pika-guest | grep --quiet INTERP; then
      echo "pika-guest needs a loader: it must be static" >&2
      exit 1
    fi
    runHook postInstallCheck
  '';

  meta = {
    description = "Reports a workload's lifecycle to the pika-cloud host that started it";
    license = lib.licenses.mit;
    mainProgram = "pika-guest";
    platforms = [
      "x86_64-linux"
      "aarch64-linux"
    ];
  };
}
