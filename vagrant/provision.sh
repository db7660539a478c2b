#!/bin/sh
# Runs inside each machine as root: installs what is needed and proves that the demo works there.
set -eu
cd /underpass
./run install
./run demo
