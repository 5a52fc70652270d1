#!/usr/bin/env bash
# Licensed under the Apache License, Version 2.0; see LICENSE.
# Training on a Slurm cluster: a learner on each of the first nodes, actor tasks
# on the others. Flags of experiment.py follow the script:
#
#   sbatch deploy/slurm.sh --level_name=dmlab30 --batch_size=32 \
#     --logdir=/shared/dmlab30 --dataset_path=/shared/data
#
# LEARNERS is the number of learners (1), PYTHON the interpreter with the
# requirements installed, ACTORS_PER_NODE the actor tasks of a node,
# ENVIRONMENTS how many environments each plays.
#
#   Before the end of --time, or `scancel --signal=TERM`, or preemption, or
#   `scontrol requeue`: the learner saves a checkpoint, the job is requeued and
#   goes on from it.
#   `scancel`: the learner saves a checkpoint, the job is at its end. Submitted
#   again, it goes on.
#   A task is killed, for want of memory for example: it is started again.
#   The last frame: the job is done.
#
# Slurm gives a job KillWait seconds (30 by default) to save, and starts it again
# about two minutes after it was requeued.
#
# All of this was run on Slurm 22.05, that of slurm_on_one_machine.sh, with one
# learner and with two, a toy level and two actor tasks; but for the end of
# --time. It has not been run on a cluster of several machines.
#
# Compute nodes should be in a network of their own: the ports of all tasks ask
# nobody for a password.
#
#SBATCH --job-name=impala
#SBATCH --nodes=5
#SBATCH --exclusive
#SBATCH --time=7-00:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
python=${PYTHON:-.venv/bin/python}
learners=${LEARNERS:-1}
actor_nodes=$((SLURM_JOB_NUM_NODES - learners))
actors=$((actor_nodes * ${ACTORS_PER_NODE:-8}))
if ((actor_nodes < 1)); then
  echo "$SLURM_JOB_NUM_NODES nodes are too few for $learners learners and" \
    "actors: more --nodes are needed." >&2
  exit 2
fi

# By their addresses, as nodes' names need not be known to the network.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Jobs may share a node's ports, and need different ones.
port=$((20000 + 16 * (SLURM_JOB_ID % 768)))
addresses=
for ((k = 0; k < learners; k++)); do
  address=$(scontrol show node "${nodes[k]}" | grep -oP 'NodeAddr=\K\S+')
  addresses+=${addresses:+,}$address:$((port + k))
done

# Runs a task as a part of a step, and again when it was killed. The program
# gets SIGTERM by itself; 143 is that it came before it was ready for it.
task='trap : TERM
code=137
until ((code < 129)); do
  code=0
  "$@" --task="$((FIRST_TASK + SLURM_PROCID))" || code=$?
  ((code != 143)) || code=75
done
exit "$code"'

run() {
  srun --kill-on-bad-exit=0 --nodelist="$nodelist" "${@:1:2}" \
    bash -c "$task" task "$python" experiment.py \
    --learner_addresses="$addresses" "${@:3}"
}

for ((k = 0; k < learners; k++)); do
  FIRST_TASK=$k nodelist=${nodes[k]} run --nodes=1 --ntasks=1 \
    --job_name=learner --num_actors="$actors" "$@" &
  steps[k]=$!
done
# They find addresses of their own.
FIRST_TASK=0 nodelist=$(IFS=,; echo "${nodes[*]:learners}") \
  run --nodes="$actor_nodes" --ntasks="$actors" --job_name=actor \
  --environments_per_actor="${ENVIRONMENTS:-4}" "$@" &

code=0
wait "${steps[0]}" || code=$?
if ((code == 75)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
