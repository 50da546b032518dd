#!/usr/bin/env bash
# Stop the cluster that start.sh started in the folder: its jobs first, then the daemons, by the ids they left there.
set -uo pipefail
folder=$(realpath "${1:?give the folder that start.sh got}")
export SLURM_CONF="$folder/slurm.conf"
scancel --user=root 2> /dev/null
for _ in $(seq 20); do
  [ -z "$(squeue --noheader 2> /dev/null)" ] && break
  sleep 0.5
done
for file in "$folder"/slurmd.pid "$folder"/slurmctld.pid "$folder"/munge/pid; do
  [ -s "$file" ] || continue
  pid=$(cat "$file")
  kill "$pid" 2> /dev/null
  for _ in $(seq 20); do
    kill -0 "$pid" 2> /dev/null || continue 2
    sleep 0.25
  done
  kill -KILL "$pid" 2> /dev/null
done
exit 0
