#!/usr/bin/env bash
# A SLURM of one node on this machine, to try CLUSTER=slurm on; as root, after apt-get install slurm-wlm munge.
#
#   bash tests/slurm/one_node.sh start DIR      then: export SLURM_CONF=DIR/slurm.conf
#   bash tests/slurm/one_node.sh stop DIR
set -euo pipefail
dir=$(realpath -m "$2")

case "$1" in
start)
  mkdir -p "$dir/state" "$dir/spool"
  head -c 1024 /dev/urandom >"$dir/munge.key" && chmod 600 "$dir/munge.key"
  cat >"$dir/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthInfo=socket=$dir/munge.socket,cred_expire=5
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE
CONF
  echo "CgroupPlugin=cgroup/v1" >"$dir/cgroup.conf"
  munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munged.log" --seed-file="$dir/munged.seed"
  export SLURM_CONF=$dir/slurm.conf
  slurmctld -c
  slurmd -c
  for _ in $(seq 30); do
    [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ] && break
    sleep 1
  done
  sinfo
  ;;
stop)
  for daemon in slurmd slurmctld munged; do
    [ ! -f "$dir/$daemon.pid" ] || kill "$(cat "$dir/$daemon.pid")"
  done
  ;;
esac
