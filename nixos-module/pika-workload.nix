# `pika-workload NAME`: the unit of a workload as the command of a host. It starts the unit and lives as long; who asks it to end asks
# the unit, and it stays until that has ended, so that outputs are collected after the unit's last word.
{
  lib,
  writeShellScriptBin,
  coreutils,
  systemd,
  util-linux,
}:
writeShellScriptBin "pika-workload" ''
  PATH=${
    lib.makeBinPath [
      coreutils
      systemd
      util-linux
    ]
  }:$PATH
  if [ $# -ne 1 ] || [ -z "$1" ]; then
    echo "usage: pika-workload NAME, of services.pika-guest.workloads.NAME; starts its unit, and ends as that does" >&2
    exit 64
  fi
  unit=pika-workload-$1.service

  show() {
    systemctl show --property "$1" --value -- "$unit"
  }

  # With the code of whom was asked for it where systemd finds that the unit ended well (or there is none), else with that of its
  # program, or 128 and the signal that ended that.
  finish() {
    case $(show Result) in success | "") exit "$1" ;; esac
    status=$(show ExecMainStatus)
    case $(show ExecMainCode) in 2 | 3) status=$((128 + status)) ;; esac
    [ "$status" -ne 0 ] || status=1
    exit "$status"
  }

  # Again for as long as somebody waits for it: what that has asked for may still be on its way to systemd.
  end() {
    trap "" TERM INT
    while kill -0 $! 2> /dev/null; do
      systemctl stop -- "$unit"
      sleep 0.1
    done
    wait $!
    finish $?
  }
  trap end TERM INT

  while :; do
    # In a session of its own, since signals for a host's command are for all of its process group.
    setsid systemctl start --wait -- "$unit" &
    wait $!
    code=$?
    # Where it lost sight of the unit, as at a restart of D-Bus or before systemd's own next try, it looks again.
    case $(show ActiveState) in
      inactive | failed | "") finish $code ;;
    esac
    sleep 1
  done
''
