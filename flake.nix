{
  description = "The guest's side of pika-cloud for NixOS: the agent, a module, and images for Incus";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      forEachSystem =
        f:
        lib.genAttrs [
          "x86_64-linux"
          "aarch64-linux"
        ] (system: f system nixpkgs.legacyPackages.${system});
      mkIncusImage = import ./nixos-module/image.nix {
        inherit nixpkgs;
        module = self.nixosModules.default;
      };
    in
    {
      packages = forEachSystem (
        system: pkgs:
        let
          image =
            kind: role:
            mkIncusImage {
              inherit kind system;
              modules = [ role ];
            };
        in
        {
          pika-guest = pkgs.callPackage ./nixos-module/package.nix { };
          default = self.packages.${system}.pika-guest;

          ci-runner-container = image "container" self.nixosModules.ci-runner;
          ci-runner-vm = image "virtual-machine" self.nixosModules.ci-runner;
          managed-agent-container = image "container" self.nixosModules.managed-agent;
          managed-agent-vm = image "virtual-machine" self.nixosModules.managed-agent;
        }
      );

      nixosModules = {
        default =
          { lib, pkgs, ... }:
          {
            imports = [ ./nixos-module ];
            services.pika-guest.package =
              lib.mkDefault
                self.packages.${pkgs.stdenv.hostPlatform.system}.pika-guest;
          };
        # Examples of roles; both need the module above.
        ci-runner = ./nixos-module/examples/ci-runner.nix;
        managed-agent = ./nixos-module/examples/managed-agent.nix;
      };

      lib = { inherit mkIncusImage; };

      checks = forEachSystem (
        system: pkgs: {
          inherit (self.packages.${system}) pika-guest;
          guest = pkgs.testers.runNixOSTest (
            import ./nixos-module/nixos-test.nix { module = self.nixosModules.default; }
          );
        }
      );
    };
}
