#!/usr/bin/env bash
# Start a SLURM cluster of one node on this machine, for tests: munged, slurmctld, slurmd. Needs root and the Debian
# packages `slurm-wlm munge`. Everything it writes lies in the folder given; stop it with stop.sh and the same folder.
#   tests/slurm/start.sh FOLDER && export SLURM_CONF=FOLDER/slurm.conf
set -euo pipefail
folder=$(realpath -m "${1:?give a folder for configuration, state and logs}")
mkdir -p "$folder"/{state,spool,munge}
chmod 755 "$folder"
cores=$(nproc) memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
host=$(hostname -s)
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

cat > "$folder/slurm.conf" <<EOF
ClusterName=minicpt
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
ReturnToService=2
KillWait=1
MpiDefault=none
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SchedulerParameters=batch_sched_delay=1
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cores RealMemory=$memory State=UNKNOWN
PartitionName=test Nodes=$host Default=YES MaxTime=60 State=UP
EOF
export SLURM_CONF="$folder/slurm.conf"

dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none
chmod 700 "$folder/munge" && chmod 400 "$folder/munge/key"
munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
  --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
slurmctld
slurmd
for _ in $(seq 60); do
  sinfo --noheader --format=%T 2> /dev/null | grep -q idle && exit 0
  sleep 0.5
done
echo "SLURM did not come up; see $folder/slurmctld.log and slurmd.log" >&2
tail -n 5 "$folder"/*.log >&2
exit 1
