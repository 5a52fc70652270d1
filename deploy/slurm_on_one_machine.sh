#!/usr/bin/env bash
# Licensed under the Apache License, Version 2.0; see LICENSE.
# A Slurm cluster on this machine alone, to try slurm.sh: a controller and some
# nodes, for as long as a command runs. Without a command it is a shell.
#
#   sudo apt-get install slurm-wlm munge
#   deploy/slurm_on_one_machine.sh sbatch --wait --nodes=3 deploy/slurm.sh \
#     --flagfile=flagfiles/quick_start --logdir=/tmp/doom
#
# NODES is the number of nodes, 4 by default. Each may use all processors. There
# are two partitions: jobs in `urgent` preempt and requeue those in `normal`, the
# default. All files are in a folder of /tmp, which is removed at the end; until
# then it has the logs. Jobs that are left at the end are cancelled.
#
# Needs no root, but a slurmd that can be several nodes (--enable-multiple-slurmd
# when it was built), as Debian's and Ubuntu's are.
set -euo pipefail

nodes=${NODES:-4}
PATH=$PATH:/usr/sbin
for program in munged slurmctld slurmd; do
  if ! command -v "$program" >/dev/null; then
    echo "There is no $program: sudo apt-get install slurm-wlm munge" >&2
    exit 2
  fi
done

folder=$(mktemp -d /tmp/slurm.XXXXXX)
daemons=()

end() {
  trap - EXIT
  if ((${#daemons[@]} > 1)); then
    scancel --user="$USER" || true
    # Their processes are not those of the daemons that end now.
    for ((i = 0; i < 600; i++)); do
      [[ $(squeue --noheader) ]] || break
      sleep 0.1
    done
  fi
  # The first one last: the others need it.
  for ((i = ${#daemons[@]} - 1; i >= 0; i--)); do
    kill "${daemons[i]}" || true
    wait "${daemons[i]}" || true
  done
  rm -rf "$folder"
}
trap end EXIT
trap 'exit 143' TERM

# Starts a daemon with a log of its own; Ctrl-C is not for it.
start() {
  local name=$1
  shift
  setsid "$@" >"$folder/$name.log" 2>&1 &
  daemons+=($!)
}

# Returns a port that is free, and none of the next ones of this kind.
free_port() {
  python3 -c 'import socket
with socket.socket() as listener:
  listener.bind(("", 0))
  print(listener.getsockname()[1])'
}

USER=$(id -un)
export USER SLURM_CONF=$folder/slurm.conf
chmod 755 "$folder"
head -c 128 /dev/urandom >"$folder/munge.key"
chmod 400 "$folder/munge.key"
mkdir "$folder/state"
{
  cat <<END
ClusterName=one_machine
SlurmctldHost=$(hostname)(localhost)
SlurmctldPort=$(free_port)
SlurmUser=$USER
SlurmdUser=$USER
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
ReturnToService=2
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
END
  for ((i = 0; i < nodes; i++)); do
    mkdir "$folder/node$i"
    echo "NodeName=node$i NodeHostname=$(hostname) NodeAddr=localhost" \
      "Port=$(free_port) CPUs=$(nproc) State=UNKNOWN"
  done
  echo "PartitionName=normal Nodes=ALL Default=YES PriorityTier=1"
  echo "PartitionName=urgent Nodes=ALL PriorityTier=2"
} >"$SLURM_CONF"

start munged munged --foreground --force --num-threads=2 \
  --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
  --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" \
  --seed-file="$folder/munged.seed"
until [[ -S $folder/munge.socket ]]; do
  kill -0 "${daemons[0]}" || { cat "$folder/munged.log" >&2; exit 1; }
  sleep 0.1
done
start slurmctld slurmctld -D -f "$SLURM_CONF"
for ((i = 0; i < nodes; i++)); do
  start "slurmd$i" slurmd -D -N "node$i" -f "$SLURM_CONF"
done
for ((i = 0; i < 300; i++)); do
  ready=$(sinfo --noheader --states=idle --format=%D --partition=normal \
    2>/dev/null) || true
  ((${ready:-0} < nodes)) || break
  sleep 0.1
done
if ((${ready:-0} < nodes)); then
  echo "Of $nodes nodes, ${ready:-0} are there. The logs:" >&2
  tail "$folder"/*.log >&2
  exit 1
fi

echo "A Slurm cluster of $nodes nodes; logs are in $folder."
"${@:-${SHELL:-bash}}"
