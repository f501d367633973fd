#!/usr/bin/env bash
# Install Slurm and shellcheck from Debian's or Ubuntu's packages, for the tests that use them. If that is not
# possible, print a message and exit with status 0: those tests are then skipped.
set -euo pipefail
packages=(slurm-wlm munge shellcheck)

if type slurmctld slurmd munged shellcheck >/dev/null 2>&1; then
    exit 0
elif [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "install_test_tools: needs root and apt-get; tests that need ${packages[*]} will be skipped"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -y -q --no-install-recommends "${packages[@]}" >/dev/null; }
install 2>/dev/null || { apt-get update -q >/dev/null && install; } ||
    echo "install_test_tools: apt-get failed; tests that need ${packages[*]} will be skipped"
