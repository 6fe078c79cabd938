# Every option of the module set to something. The programs are ones that any Linux has: the tests run these units on Debian, too.
{
  port = 20556;
  limits.eventMiB = 8;
  limits.logMiB = 16;
  workloads = {
    agent = {
      # Says READY=1 itself, since systemd listens to a unit's main process alone.
      command = [
        "/usr/bin/perl"
        "-MIO::Socket"
        "-e"
        "IO::Socket::UNIX->new(Type => SOCK_DGRAM, Peer => $ENV{NOTIFY_SOCKET})->send('READY=1'); print STDERR qq{100% of $ENV{AGENT_HOME}\\n}; sleep"
      ];
      user = "agent";
      env.AGENT_HOME = "/var/lib/agent";
      notify = "systemd";
      waitFor = [
        "network"
        "cloud-init"
      ];
      wantedBy = [ ];
    };
    steady = {
      command = [
        "/bin/sleep"
        "infinity"
      ];
      notify = "started";
    };
    talker = {
      command = [
        "/bin/sh"
        "-c"
        "pika-guest progress warm-up --fraction 0.5 && echo made > /run/pika-cloud/artifacts/made && exec sleep infinity"
      ];
    };
  };
}
