# What `cargo xtask nix` evaluates: units as text for several configurations, and configurations that must be refused.
# With `--arg lib 'import NIXPKGS/lib'` the same runs on nixpkgs' own module system.
{
  lib ? import ./lib.nix,
}:
let
  nixos = import ./nixos.nix { inherit lib; };

  # No machine has it, so that units read the same everywhere.
  package.outPath = "/nix/store/00000000000000000000000000000000-pika-guest";

  evaluate =
    modules:
    (lib.evalModules {
      modules = [
        { inherit (nixos) options; }
        ../default.nix
        { services.pika-guest.package = lib.mkDefault (package // { type = "derivation"; }); }
      ]
      ++ modules;
      specialArgs = { inherit (nixos) utils; };
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
      "rest.json" = {
        inherit (config.boot) kernelModules;
        inherit (config.users) users groups;
        packages = map toString config.environment.systemPackages;
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
  refused = configuration: names: {
    inherit names;
    config = builtins.deepSeq (files configuration) "accepted";
  };
  of = "services.pika-guest.workloads.demo";
in
{
  accepted = builtins.mapAttrs (_: files) {
    disabled = { };
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

  refused = {
    enable = refused (guest { enable = "yes"; }) "services.pika-guest.enable";
    package = refused (guest { package = "pika-guest"; }) "services.pika-guest.package";
    port-text = refused (guest { port = "20555"; }) "services.pika-guest.port";
    port-reserved = refused (guest { port = 1023; }) "services.pika-guest.port";
    port-any = refused (guest { port = 4294967295; }) "services.pika-guest.port";
    group = refused (guest { group = "wheel"; }) "services.pika-guest.group";
    ci-user = refused (guest { ciUser.enable = 1; }) "services.pika-guest.ciUser.enable";
    events-few = refused (guest { limits.eventMiB = 1; }) "services.pika-guest.limits.eventMiB";
    events-many = refused (guest { limits.eventMiB = 65; }) "services.pika-guest.limits.eventMiB";
    logs-few = refused (guest { limits.logMiB = 0; }) "services.pika-guest.limits.logMiB";
    logs-many = refused (guest { limits.logMiB = 257; }) "services.pika-guest.limits.logMiB";
    unknown = refused (guest { prot = 20555; }) "services.pika-guest.prot";
    unknown-of-workload = refused (workload { comand = [ "/bin/demo" ]; }) "${of}.comand";
    no-command = refused (guest { workloads.demo = { }; }) "${of}.command";
    empty-command = refused (workload { command = [ ]; }) "${of}.command";
    command-text = refused (workload { command = "/bin/demo"; }) "${of}.command";
    command-number = refused (workload { command = [ 7 ]; }) "${of}.command";
    command-by-name = refused (workload { command = [ "demo" ]; }) "${of}.command";
    user-unknown = refused (workload { user = "nobody-knows"; }) "${of}.user";
    user-empty = refused (workload { user = ""; }) "${of}.user";
    user-ci-without = refused (guest {
      ciUser.enable = false;
      workloads.demo.command = [ "/bin/demo" ];
    }) "${of}.user";
    env-number = refused (workload { env.DEPTH = 3; }) "${of}.env";
    env-name = refused (workload { env."A B" = "c"; }) "${of}.env";
    notify = refused (workload { notify = "ready"; }) "${of}.notify";
    wanted-by = refused (workload { wantedBy = [ "multi-user" ]; }) "${of}.wantedBy";
    wait-for = refused (workload { waitFor = [ "clouds" ]; }) "${of}.waitFor";
    wait-for-cloud-init = refused (workload { waitFor = [ "cloud-init" ]; }) "${of}.waitFor";
    name = refused (guest {
      workloads."a b".command = [ "/bin/demo" ];
    }) "services.pika-guest.workloads";
  };
}
