# A long-lived agent that tells the host when it serves. The host's spec starts it, and lives as long as it does:
#
#   "entry_command": "exec systemctl start --wait pika-workload-agent",
#   "bootstrap": { "run_as_root": true }
#
# Its state is in /var/lib/agent, where the spec mounts a persistent volume.
{
  config,
  lib,
  pkgs,
  ...
}:
{
  services.pika-guest = {
    enable = true;
    workloads.agent = {
      # In its place: whatever serves the customer.
      command = [
        (lib.getExe' pkgs.darkhttpd "darkhttpd")
        "/var/lib/agent"
        "--port"
        "8080"
      ];
      user = "agent";
      waitFor = [ "network" ];
      notify = "started";
      wantedBy = [ ];
    };
  };

  # The unit is one like any other, and takes any other setting.
  systemd.services.pika-workload-agent.serviceConfig.StateDirectory = "agent";

  users.users.agent = {
    isSystemUser = true;
    group = "agent";
    # For `pika-guest` by hand, from a shell of that user.
    extraGroups = [ config.services.pika-guest.group ];
  };
  users.groups.agent = { };
  networking.firewall.allowedTCPPorts = [ 8080 ];

  system.stateVersion = "26.05";
}
