# The sandbox of `pika-guest serve`: what is left is root's rights over files, the right to signal and to become who dials, and two
# kinds of sockets. `systemd-analyze security` rates the unit at 2.0.
#
# Left out on purpose: RestrictSUIDSGID (the tree's folders hand down their group, mode 2775), PrivateTmp and ProtectHome=yes
# (artifacts may lie there), PrivateUsers and User= (a session becomes who dials), ProcSubset (hides the boot's id).
{ group }:
{
  # The agent sets every mode itself, on the descriptor.
  UMask = "0077";
  RuntimeDirectory = "pika-guest";
  # Its end must not take the supervisors' socket along.
  RuntimeDirectoryPreserve = true;
  # As a member, root needs neither CAP_CHOWN nor CAP_FSETID to hand its files to the group.
  SupplementaryGroups = [ group ];
  CapabilityBoundingSet = [
    # Files of any user, below the tree and in artifacts.
    "CAP_DAC_OVERRIDE"
    "CAP_FOWNER"
    # Ends sessions and signals supervisors of other users.
    "CAP_KILL"
    # Becomes who dials the UNIX socket.
    "CAP_SETGID"
    "CAP_SETUID"
  ];
  NoNewPrivileges = true;

  ProtectSystem = "strict";
  ReadWritePaths = [ "/run/pika-cloud" ];
  ProtectHome = "read-only";
  PrivateMounts = true;
  PrivateDevices = true;
  DevicePolicy = "closed";

  ProtectProc = "invisible";
  # ProtectProc mounts another /proc, without what a container has mounted into its own: the boot's id.
  BindReadOnlyPaths = [ "/proc/sys/kernel/random/boot_id" ];

  # Neither vsock nor a UNIX socket with a path belongs to a network namespace.
  PrivateNetwork = true;
  IPAddressDeny = "any";
  RestrictAddressFamilies = [
    "AF_UNIX"
    "AF_VSOCK"
  ];

  ProtectClock = true;
  ProtectControlGroups = true;
  ProtectHostname = true;
  ProtectKernelLogs = true;
  ProtectKernelModules = true;
  ProtectKernelTunables = true;
  RestrictNamespaces = true;
  RestrictRealtime = true;
  LockPersonality = true;
  MemoryDenyWriteExecute = true;
  SystemCallArchitectures = "native";
  SystemCallFilter = [
    "@system-service"
    "~@resources @keyring @memlock @aio"
  ];
  SystemCallErrorNumber = "EPERM";
}
