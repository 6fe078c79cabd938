# The agent of pika-cloud in a NixOS guest: a listener in a sandbox, supervisors outside of it, the tree that the contract names,
# and units for workloads that report. See ../README.md, "NixOS".
{
  config,
  lib,
  utils,
  ...
}:
let
  inherit (lib)
    mapAttrsToList
    mkEnableOption
    mkIf
    mkOption
    types
    ;

  cfg = config.services.pika-guest;
  agent = lib.getExe' cfg.package "pika-guest";
  supervisors = "/run/pika-guest/supervise.sock";
  ci = "ci";

  unitName =
    kinds: types.strMatching "[a-zA-Z0-9@%:_.\\-]+[.](${builtins.concatStringsSep "|" kinds})";

  mebibytes = 1024 * 1024;
  # The agent's own names, see `pika-guest --help`.
  limits =
    lib.optionalAttrs (cfg.limits.eventMiB != null) {
      PIKA_GUEST_MAX_EVENT_BYTES = toString (cfg.limits.eventMiB * mebibytes);
    }
    // lib.optionalAttrs (cfg.limits.logMiB != null) {
      PIKA_GUEST_MAX_LOG_BYTES = toString (cfg.limits.logMiB * mebibytes);
    };

  workload = types.submodule {
    options = {
      command = mkOption {
        type = types.nonEmptyListOf types.str;
        example = lib.literalExpression ''[ (lib.getExe pkgs.my-agent) "--listen" "8080" ]'';
        description = ''
          The program, by its whole path, and its arguments. No shell sees it, and nothing in it is expanded.
        '';
      };

      user = mkOption {
        type = types.nonEmptyStr;
        default = ci;
        description = ''
          User that it runs as, one of {option}`users.users`. It is made a member of the group
          {option}`services.pika-guest.group` for this unit, so that it may report and leave artifacts.
        '';
      };

      env = mkOption {
        type = types.attrsOf types.str;
        default = { };
        example = {
          AGENT_HOME = "/var/lib/agent";
        };
        description = ''
          Its environment. It stands in the Nix store for everybody to read: no secrets. Those reach a guest as
          `bootstrap.env` of the host's spec, for the command that the host starts.
        '';
      };

      notify = mkOption {
        type = types.enum [
          "self"
          "started"
          "systemd"
        ];
        default = "self";
        description = ''
          Who says `ready` to the host, and when: `self`, the workload runs `pika-guest ready` when it is, whatever that
          means to it; `started`, the unit does once the program runs; `systemd`, the unit does once the program has sent
          `READY=1` (see {manpage}`sd_notify(3)`). With the last two the unit fails where `ready` cannot be written.

          Where the host starts a command, its `starting` overtakes a `ready` that was said before. A unit whose `ready` is to
          count has an empty {option}`wantedBy`, and the host's command is `systemctl start --wait pika-workload-NAME`, as root.
        '';
      };

      wantedBy = mkOption {
        type = types.listOf (unitName [
          "service"
          "target"
        ]);
        default = [ "multi-user.target" ];
        description = "Units that start it. An empty list: it is started by hand, or by the host's command.";
      };

      waitFor = mkOption {
        type = types.listOf (
          types.enum [
            "cloud-init"
            "network"
          ]
        );
        default = [ ];
        example = [ "network" ];
        description = ''
          What is to be done before it is started: `network`, the machine is online; `cloud-init`, cloud-init has ended,
          which needs {option}`services.cloud-init.enable`. Reporting needs neither.
        '';
      };
    };
  };

  waits = {
    network = "network-online.target";
    cloud-init = "cloud-final.service";
  };

  workloadUnit =
    name: workload:
    lib.nameValuePair "pika-workload-${name}" {
      description = "pika-cloud workload ${name}";
      inherit (workload) wantedBy;
      wants = map (what: waits.${what}) workload.waitFor;
      after = map (what: waits.${what}) workload.waitFor;
      # For `pika-guest ready` and the other verbs.
      path = [ cfg.package ];
      environment = limits // workload.env;
      serviceConfig = {
        Type = if workload.notify == "systemd" then "notify" else "exec";
        ExecStart = utils.escapeSystemdExecArgs workload.command;
        User = workload.user;
        SupplementaryGroups = [ cfg.group ];
        Restart = "on-failure";
      }
      // lib.optionalAttrs (workload.notify != "self") {
        ExecStartPost = utils.escapeSystemdExecArgs [
          agent
          "ready"
          "--message"
          "${name} has started"
        ];
      };
    };

  workloadAssertions =
    name: workload:
    let
      option = "services.pika-guest.workloads.${name}";
      program = builtins.head workload.command;
      isName = text: builtins.match "[A-Za-z_][A-Za-z0-9_]*" text != null;
      wrong = builtins.filter (variable: !isName variable) (builtins.attrNames workload.env);
    in
    [
      {
        assertion = builtins.match "[a-zA-Z0-9:_.\\-]+" name != null;
        message = "services.pika-guest.workloads: `${name}` cannot be part of a unit's name; use letters, digits, and any of `:_.-`.";
      }
      {
        assertion = lib.hasPrefix "/" program;
        message = "${option}.command: `${program}` is no absolute path, and a unit searches no PATH for it; use `lib.getExe pkgs.NAME`.";
      }
      {
        assertion = config.users.users ? ${workload.user};
        message = "${option}.user: there is no user `${workload.user}` in users.users; declare it, or name another.";
      }
      {
        assertion = wrong == [ ];
        message = "${option}.env: ${toString wrong} cannot be the name of an environment variable.";
      }
      {
        assertion = builtins.elem "cloud-init" workload.waitFor -> config.services.cloud-init.enable;
        message = "${option}.waitFor: `cloud-init` would be waited for in vain; set services.cloud-init.enable, or leave it out.";
      }
    ];
in
{
  options.services.pika-guest = {
    enable = mkEnableOption "the guest agent of pika-cloud, which reports to the host and runs what it asks for";

    package = mkOption {
      type = types.package;
      defaultText = lib.literalExpression "the flake's own packages.pika-guest";
      description = "Package with `bin/pika-guest`.";
    };

    port = mkOption {
      # The kernel keeps vsock ports below 1024 for who has CAP_NET_BIND_SERVICE, and the highest number for "any".
      type = types.nullOr (types.ints.between 1024 4294967294);
      default = null;
      example = 20556;
      description = ''
        Vsock port that it listens on, for the host alone. `null`: port 20555, where hosts look for it, in a virtual
        machine, and none in a container, which has no vsock of its own. A number is listened on wherever it runs.
      '';
    };

    group = mkOption {
      type = types.str;
      readOnly = true;
      default = "pika-cloud";
      description = ''
        Group whose members may report and leave artifacts. The guest contract fixes its name; other modules read it here.
      '';
    };

    ciUser.enable = mkOption {
      type = types.bool;
      default = true;
      description = ''
        Whether to make the user `${ci}`, whom commands of the host run as unless its spec sets
        `bootstrap.run_as_root`. Without it they run as `nobody`.
      '';
    };

    limits = {
      eventMiB = mkOption {
        type = types.nullOr (types.ints.between 2 64);
        default = null;
        description = ''
          Most mebibytes of events that wait for the host; beyond it progress is refused and counted. `null`: the guest
          contract's 64. A quarter of the memory limit and half of what is free in `/run` always hold as well.
        '';
      };

      logMiB = mkOption {
        type = types.nullOr (types.ints.between 1 256);
        default = null;
        description = ''
          Most mebibytes of a command's output that wait for the host; beyond it output is dropped and counted, and the
          command never waits. `null`: the guest contract's 256. The other bounds are those of
          {option}`services.pika-guest.limits.eventMiB`.
        '';
      };
    };

    workloads = mkOption {
      type = types.attrsOf workload;
      default = { };
      description = ''
        Programs of the image that report to the host, each in a unit `pika-workload-NAME.service` outside of the agent's
        sandbox; its end is not theirs, nor the other way round. They are beside what a host starts by its spec's
        `entry_command`, which needs no option here and gets a unit of its own from `pika-guest-supervise.socket`.
      '';
    };
  };

  config = mkIf cfg.enable {
    assertions = builtins.concatLists (mapAttrsToList workloadAssertions cfg.workloads);

    environment.systemPackages = [ cfg.package ];

    users.groups.${cfg.group} = { };
    users.users = mkIf cfg.ciUser.enable {
      ${ci} = {
        isNormalUser = true;
        description = "Commands of the pika-cloud host";
        extraGroups = [ cfg.group ];
      };
    };

    # A container has the host's kernel, and nothing to load.
    boot.kernelModules = mkIf (!config.boot.isContainer) [
      "vsock"
      "vmw_vsock_virtio_transport"
    ];

    systemd.tmpfiles.settings."10-pika-cloud" =
      lib.genAttrs
        [
          "/run/pika-cloud"
          "/run/pika-cloud/artifacts"
          "/run/pika-cloud/logs"
        ]
        (_: {
          d = {
            mode = "2775";
            user = "root";
            inherit (cfg) group;
          };
        });

    systemd.services = {
      pika-guest = {
        description = "pika-cloud guest agent";
        wantedBy = [ "multi-user.target" ];
        wants = [ "pika-guest-supervise.socket" ];
        after = [ "pika-guest-supervise.socket" ];
        # It is tried again for ever: a guest without it is lost to its host.
        startLimitIntervalSec = 0;
        environment = limits // {
          # Starts go over this socket or nowhere: a workload would inherit the sandbox.
          PIKA_GUEST_SUPERVISE = supervisors;
        };
        serviceConfig = {
          Type = "notify";
          ExecStart = utils.escapeSystemdExecArgs (
            [
              agent
              "serve"
              "--unix"
              "/run/pika-guest/serve.sock"
            ]
            ++ lib.optionals (cfg.port != null) [
              "--port"
              (toString cfg.port)
            ]
          );
          Restart = "always";
          RestartSec = 1;
          WatchdogSec = 30;
          KillMode = "process";
          OOMPolicy = "continue";
          TasksMax = "infinity";
        }
        // import ./hardening.nix { inherit (cfg) group; };
      };

      # One for each command that a host starts.
      "pika-guest-supervise@" = {
        description = "pika-cloud supervisor of a workload";
        # A new configuration ends no command.
        restartIfChanged = false;
        # A host may ask while the machine still boots, and is not kept waiting for the rest of that.
        requires = [ "sysinit.target" ];
        after = [ "sysinit.target" ];
        conflicts = [ "shutdown.target" ];
        before = [ "shutdown.target" ];
        unitConfig = {
          DefaultDependencies = false;
          CollectMode = "inactive-or-failed";
        };
        # What commands find: all of the system's programs.
        path = [
          "/run/wrappers"
          "/run/current-system/sw"
        ];
        environment = limits;
        serviceConfig = {
          ExecStart = utils.escapeSystemdExecArgs [
            agent
            "supervise"
            "--socket"
          ];
          StandardInput = "socket";
          StandardOutput = "journal";
          StandardError = "journal";
          # TERM is for the supervisor, which passes it on and waits for the workload's grace.
          KillMode = "mixed";
          TimeoutStopSec = 90;
          OOMPolicy = "continue";
          MemoryAccounting = true;
          # Workloads may run containers of their own.
          Delegate = true;
          TasksMax = "infinity";
        };
      };
    }
    // lib.mapAttrs' workloadUnit cfg.workloads;

    systemd.sockets.pika-guest-supervise = {
      description = "pika-cloud supervisors";
      wantedBy = [ "sockets.target" ];
      socketConfig = {
        ListenStream = supervisors;
        SocketMode = "0600";
        Accept = true;
        RemoveOnStop = true;
      };
    };
  };
}
