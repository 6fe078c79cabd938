# Every option of the module set to something.
{
  port = 20556;
  limits.eventMiB = 8;
  limits.logMiB = 16;
  workloads = {
    agent = {
      command = [
        "/bin/sh"
        "--greeting"
        "100% of $HOME"
      ];
      user = "agent";
      env.AGENT_HOME = "/var/lib/agent";
      notify = "systemd";
      waitFor = [
        "network"
        "cloud-init"
      ];
    };
    warm-up = {
      command = [ "/bin/true" ];
      notify = "started";
    };
    by-hand = {
      command = [ "/bin/true" ];
      wantedBy = [ ];
    };
  };
}
