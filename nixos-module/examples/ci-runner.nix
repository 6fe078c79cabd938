# A runner for CI jobs: the tools that jobs need. The command comes from the host, in its spec's `entry_command`, and runs as the
# user `ci`; nothing here starts by itself.
{ pkgs, ... }:
{
  services.pika-guest = {
    enable = true;
    # Of a log that the host does not take for a while.
    limits.logMiB = 64;
  };

  environment.systemPackages = [
    pkgs.gcc
    pkgs.git
    pkgs.gnumake
  ];

  system.stateVersion = "26.05";
}
