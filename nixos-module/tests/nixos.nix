# The options of NixOS that the module sets, and how their values read in files. Names and forms are NixOS' own; what it adds to
# every unit (locale, time zone, the usual programs) is left out.
{ lib }:
let
  inherit (builtins)
    concatLists
    concatMap
    concatStringsSep
    filter
    isBool
    isList
    replaceStrings
    toJSON
    ;
  inherit (lib) mapAttrsToList mkOption types;

  option =
    type: default:
    mkOption {
      inherit type default;
      description = "NixOS' own.";
    };
  strings = option (types.listOf types.str) [ ];
  values = option (types.attrsOf types.anything) { };

  unit = section: {
    options = {
      description = option types.str "";
      after = strings;
      before = strings;
      conflicts = strings;
      requires = strings;
      wants = strings;
      wantedBy = strings;
      unitConfig = values;
      ${section} = values;
    };
  };
  service = {
    imports = [ (unit "serviceConfig") ];
    options = {
      environment = option (types.attrsOf types.str) { };
      path = option (types.listOf types.anything) [ ];
      restartIfChanged = option types.bool true;
      startLimitIntervalSec = option (types.nullOr types.anything) null;
    };
  };

  word = value: if isBool value then (if value then "true" else "false") else toString value;
  line = name: value: "${name}=${word value}\n";
  # A list is a setting given several times.
  lines = name: value: map (line name) (if isList value then value else [ value ]);
  section =
    name: settings:
    let
      text = concatLists (mapAttrsToList lines settings);
    in
    if text == [ ] then [ ] else [ "[${name}]\n${concatStringsSep "" text}" ];
  joined = name: list: lib.optionalAttrs (list != [ ]) { ${name} = concatStringsSep " " list; };

  head =
    unit:
    section "Unit" (
      {
        Description = unit.description;
      }
      // joined "After" unit.after
      // joined "Before" unit.before
      // joined "Conflicts" unit.conflicts
      // joined "Requires" unit.requires
      // joined "Wants" unit.wants
      // lib.optionalAttrs (unit.startLimitIntervalSec or null != null) {
        StartLimitIntervalSec = unit.startLimitIntervalSec;
      }
      // unit.unitConfig
    );
  foot = unit: section "Install" (joined "WantedBy" unit.wantedBy);
  text = concatStringsSep "\n";

  searched = path: concatMap (entry: [ "${entry}/bin" ]) path;
  environment =
    service:
    lib.optionalAttrs (service.path != [ ]) { PATH = concatStringsSep ":" (searched service.path); }
    // service.environment;
  assignments =
    service: mapAttrsToList (name: value: toJSON "${name}=${value}") (environment service);
in
{
  options = {
    assertions = option (types.listOf types.anything) [ ];
    boot.isContainer = option types.bool false;
    boot.kernelModules = strings;
    environment.systemPackages = option (types.listOf types.package) [ ];
    services.cloud-init.enable = option types.bool false;
    networking.firewall.allowedTCPPorts = option (types.listOf types.anything) [ ];
    system.stateVersion = option types.str "";
    systemd.services = option (types.attrsOf (types.submodule service)) { };
    systemd.sockets = option (types.attrsOf (types.submodule (unit "socketConfig"))) { };
    systemd.tmpfiles.settings = values;
    users.groups = values;
    users.users = values;
  };

  # Quoted for a unit's command line, as NixOS does it.
  utils.escapeSystemdExecArgs =
    args:
    let
      escape = arg: replaceStrings [ "%" "$" ] [ "%%" "$$" ] (toJSON (toString arg));
    in
    concatStringsSep " " (map escape args);

  render = {
    service =
      service:
      text (
        head service
        ++ section "Service" (
          lib.optionalAttrs (assignments service != [ ]) { Environment = assignments service; }
          // service.serviceConfig
        )
        ++ foot service
      );
    socket = socket: text (head socket ++ section "Socket" socket.socketConfig ++ foot socket);
    tmpfiles =
      rules:
      let
        fields = rule: [
          (rule.mode or "-")
          (rule.user or "-")
          (rule.group or "-")
        ];
        lines =
          path: mapAttrsToList (type: rule: "${type} ${path} ${concatStringsSep " " (fields rule)}\n");
      in
      concatStringsSep "" (concatLists (mapAttrsToList lines rules));

    # Everything else, for people to compare.
    lines = set: concatStringsSep "" (mapAttrsToList (name: value: "${name}: ${toJSON value}\n") set);
    files =
      folders:
      let
        file =
          folder: name: content:
          "==> ${folder}/${name}\n${content}";
      in
      concatStringsSep "" (
        concatLists (mapAttrsToList (folder: files: mapAttrsToList (file folder) files) folders)
      );
  };

  # What NixOS refuses a configuration with.
  failures = config: map (found: found.message) (filter (found: !found.assertion) config.assertions);
}
