# An image for Incus: a folder with the two files that `incus image import` takes. What makes them is NixOS' own.
{ nixpkgs, module }:
{
  # Modules of the system in the image; the agent's is there already, and is to be enabled.
  modules,
  # What Incus makes of it: "virtual-machine" or "container".
  kind ? "virtual-machine",
  # The architecture that it runs on.
  system ? "x86_64-linux",
}:
let
  kinds = {
    virtual-machine = {
      base = "incus-virtual-machine.nix";
      disk = build: "${build.qemuImage}/*.qcow2";
      name = "disk.qcow2";
    };
    container = {
      base = "lxc-container.nix";
      disk = build: "${build.squashfs}/*.squashfs";
      name = "rootfs.squashfs";
    };
  };
  chosen =
    kinds.${kind}
      or (throw "mkIncusImage: kind is `${toString kind}'; it must be \"virtual-machine\" or \"container\".");

  nixos = nixpkgs.lib.nixosSystem {
    modules = [
      { nixpkgs.hostPlatform = system; }
      "${nixpkgs}/nixos/modules/virtualisation/${chosen.base}"
      module
    ]
    ++ modules;
  };
  inherit (nixos.config.system) build;
in
nixos.pkgs.runCommand "pika-cloud-${kind}" { passthru = { inherit nixos; }; } ''
  mkdir $out
  cp ${build.metadata}/tarball/*.tar.xz $out/metadata.tar.xz
  cp ${chosen.disk build} $out/${chosen.name}
''
