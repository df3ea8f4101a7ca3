#!/usr/bin/env bash
# SAELens beside us in one environment, with the oldest libraries that pyproject.toml allows and with the newest.
#
#     tests/peers/environment.sh [FOLDER]          FOLDER (default: .venv-environment) takes the two environments
#
# Prints the versions, then a line a check. CI skips it: some 2 GB, minutes. The newest is transformer-lens' last 3, as
# SAELens wants < 4; that newer ones work is what every other test shows. torch is the one of constraints.txt in both.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
folder=${1:-.venv-environment}
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$folder"
if [ ! -x "$folder/newest/bin/python" ]; then
    "$python" -m venv "$folder/newest"
    "$folder/newest/bin/pip" install --quiet -c constraints.txt torch # for CPUs, before anything asks for another
    "$folder/newest/bin/pip" install --quiet -c constraints.txt . 'sae-lens>=6.54' 'transformer-lens<4' torchdata
    "$folder/newest/bin/pip" uninstall --quiet --yes tcsae # the sources here are what is tested
fi
if [ ! -x "$folder/oldest/bin/python" ]; then
    "$python" -m venv --without-pip "$folder/oldest"
    # What has no older version below is that of the newest environment.
    "$folder/newest/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
        >"$(ls -d "$folder"/oldest/lib/python*/site-packages)/newest.pth"
    "$folder/newest/bin/pip" --python "$folder/oldest/bin/python" install --quiet --no-deps --ignore-installed \
        -r tests/peers/oldest.txt
fi
ln -sfn "$PWD" "$folder/tcsae"
for which in oldest newest; do
    echo "== $which"
    PYTHONPATH="$folder" "$folder/$which/bin/python" -W ignore tests/peers/environment.py
done
