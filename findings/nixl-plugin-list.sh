#!/usr/bin/env bash
# Software:  nixl-cu12 1.5.1 (PyPI), numpy 2.3.5, on a machine without NVIDIA DOCA, INFINIA or cuFile.
# Behaviour: get_plugin_list() names every plugin file of the wheel, ten, also those whose libraries are missing. For
#            those get_plugin_params() gives an empty dict, no error, and so it does for a plugin that loads and
#            has no parameters (OBJ): the two cannot be told apart. Only the list of memory types tells, or creating it.
# Seen:
#   listed: AZURE_BLOB GDS GDS_MT GPUNETIO GUSLI INFINIA LIBFABRIC OBJ POSIX UCX
#   INFINIA: params {}, memory types [], created: NIXL_ERR_NOT_FOUND
#   GPUNETIO: params {}, memory types [], created: NIXL_ERR_NOT_FOUND
#   OBJ: params {}, memory types ['DRAM_SEG', 'OBJ_SEG'], created: NIXL_ERR_BACKEND
#   POSIX: params 5, memory types ['DRAM_SEG', 'FILE_SEG'], created: yes
# Needs: python3 3.11 with venv, pip. No root.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check --no-deps nixl-cu12==1.5.1 numpy==2.3.5
cat >"$dir/try.py" <<'PY'
from nixl_cu12._api import nixl_agent, nixl_agent_config
agent = nixl_agent("agent", nixl_agent_config(backends=[]))
print("listed:", *sorted(agent.get_plugin_list()))
for name in ("INFINIA", "GPUNETIO", "OBJ", "POSIX"):
    params = agent.get_plugin_params(name)
    kinds = agent.get_plugin_mem_types(name)
    try:
        agent.create_backend(name, {})
        created = "yes"
    except Exception as error:
        created = str(error)
    print(f"{name}: params {len(params) or {}}, memory types {kinds}, created: {created}")
PY
env -u AWS_DEFAULT_BUCKET "$dir/venv/bin/python" "$dir/try.py" 2>"$dir/log" | grep -E '^[A-Za-z]+: ' >"$dir/seen" ||
    { cat "$dir/log"; exit 1; }
diff -u <(sed -n '/^# Seen:/,/^# Needs/{s/^#   //p}' "$0") "$dir/seen"
echo "still so: listed is not loadable"
