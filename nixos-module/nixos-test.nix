# A machine that boots, whose workload gets ready, and whose workload and commands outlive the agent.
{ module }:
{ lib, pkgs, ... }:
{
  name = "pika-guest";

  nodes.guest = {
    imports = [ module ];
    services.pika-guest = {
      enable = true;
      workloads = {
        steady = {
          command = [
            (lib.getExe' pkgs.coreutils "sleep")
            "infinity"
          ];
          notify = "started";
        };
        talker = {
          command = [
            (lib.getExe (
              pkgs.writeShellApplication {
                name = "talker";
                text = ''
                  pika-guest progress warm-up --fraction 0.5
                  exec sleep infinity
                '';
              }
            ))
          ];
          wantedBy = [ ];
        };
      };
    };
  };

  testScript = ''
    guest.wait_for_unit("pika-guest.service")
    guest.wait_until_succeeds("pika-guest status | grep '^ready '")

    with subtest("an unprivileged unit reports"):
        guest.succeed("systemctl start pika-workload-talker")
        guest.wait_until_succeeds("pika-guest events | grep -F warm-up")

    with subtest("workloads outlive the agent"):
        pid = guest.succeed("systemctl show --property MainPID --value pika-workload-steady").strip()
        guest.succeed("systemctl restart pika-guest.service", "systemctl kill --signal KILL pika-guest.service")
        guest.wait_until_succeeds("systemctl is-active pika-guest.service")
        assert pid == guest.succeed("systemctl show --property MainPID --value pika-workload-steady").strip()
        guest.succeed("test -S /run/pika-guest/supervise.sock")

    with subtest("the tree is the group's"):
        guest.succeed("stat --format '%a %G' /run/pika-cloud | grep -Fx '2775 pika-cloud'")
  '';
}
