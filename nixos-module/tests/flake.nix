# The flake's outputs over a nixpkgs that only says what it was asked for: names, how the package is built, of what images are made.
{ lib }:
let
  asked = name: args: args // { outPath = "/nix/store/00000000000000000000000000000000-${name}"; };
  nixpkgs = {
    outPath = "/nixpkgs";
    lib = lib // {
      nixosSystem = args: {
        config.system.build = builtins.mapAttrs (name: _: "/build/${name}") {
          metadata = null;
          qemuImage = null;
          squashfs = null;
        };
        pkgs = pkgs // {
          runCommand = name: _: script: {
            inherit name script;
            base = builtins.head (builtins.filter builtins.isString args.modules);
          };
        };
      };
    };
    legacyPackages = builtins.mapAttrs (_: _: pkgs) {
      x86_64-linux = null;
      aarch64-linux = null;
    };
  };
  pkgs = {
    callPackage =
      path: args:
      import path (
        {
          lib = lib // {
            fileset.toSource = set: set.fileset;
            fileset.unions = map toString;
            importTOML = path: builtins.fromTOML (builtins.readFile path);
            licenses.mit = "MIT";
          };
          rustPlatform.buildRustPackage = args: asked args.pname { inherit args; };
          glibc.static = "glibc.static";
          binutils = "binutils";
        }
        // args
      );
    testers.runNixOSTest = test: asked "test" { inherit test; };
  };
  flake = import ../../flake.nix;
  self = flake.outputs { inherit self nixpkgs; };
  image = name: { inherit (self.packages.x86_64-linux.${name}) base script; };
  package = self.packages.x86_64-linux.pika-guest.args;
in
{
  outputs = builtins.mapAttrs (_: builtins.attrNames) {
    inherit (self) lib nixosModules;
    packages = self.packages.x86_64-linux;
    checks = self.checks.x86_64-linux;
    systems = self.packages;
  };
  container = image "ci-runner-container";
  vm = image "managed-agent-vm";
  package = removeAttrs package [
    "src"
    "cargoLock"
    "installCheckPhase"
  ];
  missing = builtins.filter (path: !builtins.pathExists path) (
    map (path: /. + path) package.src ++ [ package.cargoLock.lockFile ]
  );
  wrongKind =
    (self.lib.mkIncusImage {
      modules = [ ];
      kind = "vm";
    }).script;
}
