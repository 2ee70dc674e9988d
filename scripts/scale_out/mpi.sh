#!/usr/bin/env bash
# Answers a file of requests in the ranks of an MPI job, a shard a rank:
#
#   mpirun -n 8 --map-by node --bind-to none scripts/scale_out/mpi.sh requests.jsonl answers -m MODEL
#
# MPI only starts it; the ranks do not talk. Needs `bitnet`, or the program that $BITNET names, and the file on every node. Runs
# under Open MPI, and under what sets PMI_RANK (MPICH, Intel MPI) or SLURM_PROCID (srun).
set -euo pipefail
rank=${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-${SLURM_PROCID:?no rank: start this with mpirun or srun}}}
ranks=${OMPI_COMM_WORLD_SIZE:-${PMI_SIZE:-${SLURM_NTASKS:?no number of ranks: start this with mpirun or srun}}}

exec "${BITNET:-bitnet}" batch -i "$1" -o "$2-$rank.jsonl" --shard "$rank/$ranks" "${@:3}"
