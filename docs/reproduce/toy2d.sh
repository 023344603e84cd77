#!/usr/bin/env bash
# docs/results.md: the two-dimensional densities, on one thread; about 45 minutes.
set -euo pipefail
export OMP_NUM_THREADS=1

for density in checkerboard two_moons 8gaussians pinwheel circles swiss_roll gaussian tree rose; do
  jkoflow toy2d --config "$density"
done
jkoflow toy2d --config checkerboard --run runs/toy2d-checkerboard-refined \
  --set jko.reparameterize=2 --set jko.refine=2 --set jko.later_iterations=600
