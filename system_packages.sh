#!/usr/bin/env bash
# Licensed under the Apache License, Version 2.0; see LICENSE.
# Makes sure that this machine has some of Debian's or Ubuntu's packages:
#
#   ./system_packages.sh g++ python3-venv
#
# Installs those that are missing if it is run by root, else tells the line that
# installs them. A program of another origin is as good as the package's.
set -euo pipefail

has() {
  case $1 in
    python3-venv) python3 -c 'import ensurepip, venv' ;;
    *) command -v "$1" ;;
  esac >/dev/null 2>&1
}

missing=()
for package; do
  has "$package" || missing+=("$package")
done
((${#missing[@]})) || exit 0

if ! command -v apt-get >/dev/null; then
  echo "This machine lacks ${missing[*]} (so they are called in Debian):" \
    "install them with its own package manager." >&2
  exit 1
fi
if ((EUID)); then
  echo "This machine lacks ${missing[*]}. Install with:" \
    "sudo apt-get update && sudo apt-get install ${missing[*]}" >&2
  exit 1
fi
echo "Installing ${missing[*]}."
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update -qq &&
  apt-get install -qq --no-install-recommends "${missing[@]}" >/dev/null; }; then
  echo "apt-get could not install ${missing[*]}: see above." >&2
  exit 1
fi
