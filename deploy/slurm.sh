#!/usr/bin/env bash
# Licensed under the Apache License, Version 2.0; see LICENSE.
# Training on a Slurm cluster: the learner on the first node, actor tasks on the
# others. Flags of experiment.py follow the script:
#
#   sbatch deploy/slurm.sh --level_name=dmlab30 --batch_size=32 \
#     --logdir=/shared/dmlab30 --dataset_path=/shared/data
#
# Submitted again, it goes on from the last checkpoint in --logdir. PYTHON is the
# interpreter with the requirements installed, ACTORS_PER_NODE the actor tasks of
# a node, ENVIRONMENTS how many environments each plays.
#
# Compute nodes should be in a network of their own: TensorFlow's port asks
# nobody for a password.
#
#SBATCH --job-name=impala
#SBATCH --nodes=5
#SBATCH --exclusive
#SBATCH --time=7-00:00:00
#SBATCH --signal=TERM@120
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
python=${PYTHON:-.venv/bin/python}
environments=${ENVIRONMENTS:-4}
actors_per_node=${ACTORS_PER_NODE:-8}
actors=$(((SLURM_JOB_NUM_NODES - 1) * actors_per_node))
read -r learner < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Jobs may share a node's ports, and need different ones.
address=$learner:$((20000 + SLURM_JOB_ID % 20000))

srun --nodes=1 --ntasks=1 --nodelist="$learner" \
  "$python" experiment.py --job_name=learner --task=0 \
  --learner_address="$address" --num_actors="$actors" "$@" &
learner_step=$!

# SLURM_PROCID is the number of a task in its step, from 0. One that dies
# doesn't end the others (--kill-on-bad-exit).
srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks="$actors" \
  --exclude="$learner" --kill-on-bad-exit=0 \
  bash -c 'exec "$@" --task="$SLURM_PROCID" \
    --actor_address="$SLURMD_NODENAME:$((8001 + SLURM_PROCID))"' actor \
  "$python" experiment.py --job_name=actor --learner_address="$address" \
  --environments_per_actor="$environments" "$@" &

# Actors wait for a learner that died; here nobody starts it anew, so its end is
# the end of the job.
wait "$learner_step"
