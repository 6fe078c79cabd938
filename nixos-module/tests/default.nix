# What `cargo xtask nix` evaluates: units as text for several configurations, and configurations that must be refused.
# With `--arg lib 'import NIXPKGS/lib'` the same runs on nixpkgs' own module system.
{
  lib ? import ./lib.nix,
}:
let
  nixos = import ./nixos.nix { inherit lib; };

  # No machine has it, so that units read the same everywhere.
  package = name: {
    type = "derivation";
    outPath = "/nix/store/00000000000000000000000000000000-${name}";
  };
  pkgs = lib.genAttrs [ "darkhttpd" "gcc" "git" "gnumake" ] package;

  evaluate =
    modules:
    (lib.evalModules {
      modules = [
        { inherit (nixos) options; }
        ../default.nix
        { services.pika-guest.package = lib.mkDefault (package "pika-guest"); }
      ]
      ++ modules;
      specialArgs = {
        inherit (nixos) utils;
        inherit pkgs;
      };
    }).config;

  checked =
    config:
    let
      failures = nixos.failures config;
    in
    if failures == [ ] then
      config
    else
      throw "Failed assertions:\n${builtins.concatStringsSep "\n" failures}";

  files =
    configuration:
    let
      config = checked (evaluate [ configuration ]);
      named = ending: lib.mapAttrs' (name: unit: lib.nameValuePair "${name}.${ending}" unit);
    in
    named "service" (builtins.mapAttrs (_: nixos.render.service) config.systemd.services)
    // named "socket" (builtins.mapAttrs (_: nixos.render.socket) config.systemd.sockets)
    // named "tmpfiles" (builtins.mapAttrs (_: nixos.render.tmpfiles) config.systemd.tmpfiles.settings)
    // {
      "rest.txt" = nixos.render.lines {
        inherit (config.boot) kernelModules;
        inherit (config.users) users groups;
        packages = map toString config.environment.systemPackages;
        openPorts = config.networking.firewall.allowedTCPPorts;
        keptOverChanges = builtins.filter (name: !config.systemd.services.${name}.restartIfChanged) (
          builtins.attrNames config.systemd.services
        );
      };
    };

  guest = settings: {
    services.pika-guest = {
      enable = true;
    }
    // settings;
  };
  # A workload that is right but for these settings.
  workload =
    settings:
    guest {
      workloads.demo = {
        command = [ "/bin/demo" ];
      }
      // settings;
    };
  refuse = configuration: names: {
    inherit names;
    config = builtins.deepSeq (files configuration) "accepted";
  };
  of = "services.pika-guest.workloads.demo";

  accepted = {
    disabled = { };
    ci-runner.imports = [ ../examples/ci-runner.nix ];
    managed-agent.imports = [ ../examples/managed-agent.nix ];
    plain = guest { };
    container = {
      imports = [ (guest { ciUser.enable = false; }) ];
      boot.isContainer = true;
    };
    full = {
      imports = [ (guest (import ./full.nix)) ];
      services.cloud-init.enable = true;
      users.users.agent.isSystemUser = true;
    };
  };

  flake = import ./flake.nix { inherit lib; };

  refused = {
    enable = refuse (guest { enable = "yes"; }) "services.pika-guest.enable";
    package = refuse (guest { package = "pika-guest"; }) "services.pika-guest.package";
    port-text = refuse (guest { port = "20555"; }) "services.pika-guest.port";
    port-reserved = refuse (guest { port = 1023; }) "services.pika-guest.port";
    port-any = refuse (guest { port = 4294967295; }) "services.pika-guest.port";
    group = refuse (guest { group = "wheel"; }) "services.pika-guest.group";
    ci-user = refuse (guest { ciUser.enable = 1; }) "services.pika-guest.ciUser.enable";
    events-few = refuse (guest { limits.eventMiB = 1; }) "services.pika-guest.limits.eventMiB";
    events-many = refuse (guest { limits.eventMiB = 65; }) "services.pika-guest.limits.eventMiB";
    logs-few = refuse (guest { limits.logMiB = 0; }) "services.pika-guest.limits.logMiB";
    logs-many = refuse (guest { limits.logMiB = 257; }) "services.pika-guest.limits.logMiB";
    unknown = refuse (guest { prot = 20555; }) "services.pika-guest.prot";
    unknown-of-workload = refuse (workload { comand = [ "/bin/demo" ]; }) "${of}.comand";
    no-command = refuse (guest { workloads.demo = { }; }) "${of}.command";
    empty-command = refuse (workload { command = [ ]; }) "${of}.command";
    command-text = refuse (workload { command = "/bin/demo"; }) "${of}.command";
    command-number = refuse (workload { command = [ 7 ]; }) "${of}.command";
    command-by-name = refuse (workload { command = [ "demo" ]; }) "${of}.command";
    user-unknown = refuse (workload { user = "nobody-knows"; }) "${of}.user";
    user-empty = refuse (workload { user = ""; }) "${of}.user";
    user-ci-without = refuse (guest {
      ciUser.enable = false;
      workloads.demo.command = [ "/bin/demo" ];
    }) "${of}.user";
    env-number = refuse (workload { env.DEPTH = 3; }) "${of}.env";
    env-name = refuse (workload { env."A B" = "c"; }) "${of}.env";
    notify = refuse (workload { notify = "ready"; }) "${of}.notify";
    wanted-by = refuse (workload { wantedBy = [ "multi-user" ]; }) "${of}.wantedBy";
    wait-for = refuse (workload { waitFor = [ "clouds" ]; }) "${of}.waitFor";
    wait-for-cloud-init = refuse (workload { waitFor = [ "cloud-init" ]; }) "${of}.waitFor";
    name = refuse (guest {
      workloads."a b".command = [ "/bin/demo" ];
    }) "services.pika-guest.workloads";
    image-kind = {
      names = "mkIncusImage: kind";
      config = flake.wrongKind;
    };
  };

  plain = files accepted.plain;
  # What reads as it does in `plain` is not repeated.
  differing =
    files:
    lib.genAttrs (builtins.filter (name: files.${name} != plain.${name} or null) (
      builtins.attrNames files
    )) (name: files.${name});
in
{
  # Files, each after a line with its name.
  accepted = nixos.render.files (
    builtins.mapAttrs (_: configuration: differing (files configuration)) accepted
    // {
      inherit plain;
      flake."outputs.txt" = nixos.render.lines (removeAttrs flake [ "wrongKind" ]);
    }
  );

  # What must fail to evaluate, with an error that has these words in it.
  refused = builtins.mapAttrs (_: case: case.config) refused;
  refusals = builtins.concatStringsSep "" (
    lib.mapAttrsToList (name: case: "${name} ${case.names}\n") refused
  );
}
