#!/usr/bin/env bash
# Software:  nixl-cu12 1.5.1 (PyPI) with the UCX of its wheel, numpy 2.3.5, on Linux with memfd_secret().
# Behaviour: a target registers memory that the kernel cannot pin (here memfd_secret; a mapping of a dma-buf is of
#            that kind, too) without an error. A peer's write into it and a read from it then end with 'remote
#            disconnect', though the target lives: UCX chose cross-memory attach (cma) and does not fall back. With
#            UCX_TLS=^cma the same transfer succeeds.
# Seen:
#   ordinary target, UCX_TLS=all: WRITE DONE, target got the bytes: True
#   ordinary target, UCX_TLS=all: READ DONE
#   unpinnable target, UCX_TLS=all: WRITE NIXL_ERR_REMOTE_DISCONNECT, target got the bytes: False
#   unpinnable target, UCX_TLS=all: READ NIXL_ERR_REMOTE_DISCONNECT
#   unpinnable target, UCX_TLS=^cma: WRITE DONE, target got the bytes: True
#   unpinnable target, UCX_TLS=^cma: READ DONE
# Needs: python3 3.11 with venv, pip; memfd_secret and process_vm_writev allowed; loop-back network. No root, no GPU.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check --no-deps nixl-cu12==1.5.1 numpy==2.3.5
cat >"$dir/try.py" <<'PY'
import ctypes as c, mmap, os, subprocess, sys, threading, time
from nixl_cu12._api import nixl_agent, nixl_agent_config
SIZE = 1 << 20
def memory(kind):
    fd = -1
    if kind == "unpinnable":
        fd = c.CDLL(None, use_errno=True).syscall(447, 0)
        if fd < 0:
            sys.exit(f"memfd_secret: {os.strerror(c.get_errno())}: cannot be shown here")
        os.ftruncate(fd, SIZE)
    space = mmap.mmap(fd, SIZE)
    return space, c.addressof(c.c_char.from_buffer(space))
role, kind, operation = sys.argv[1:]
agent = nixl_agent(role, nixl_agent_config(backends=["UCX"]))
space, address = memory(kind if role == "target" else "ordinary")
space[:] = (b"T" if role == "target" else b"I") * SIZE
keep = agent.register_memory([(address, SIZE, 0, "")], "DRAM")
mine = agent.get_xfer_descs([(address, SIZE, 0)], "DRAM")
if role == "target":
    for part in (agent.get_agent_metadata(), agent.get_serialized_descs(mine)):
        print(part.hex(), flush=True)
    go = threading.Thread(target=sys.stdin.readline)
    go.start()
    while go.is_alive():  # the target's side must make progress, too
        agent.get_new_notifs()
        time.sleep(0.01)
    print(space[:] == b"I" * SIZE, flush=True)
    os._exit(0)
target = subprocess.Popen([sys.executable, sys.argv[0], "target", kind, operation], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE)
lines = (line.strip() for line in target.stdout)
parts = []
for line in lines:
    try: parts.append(bytes.fromhex(line))
    except ValueError: continue  # the wheel's own messages
    if len(parts) == 2: break
name = agent.add_remote_agent(parts[0])
theirs = agent.deserialize_descs(parts[1])
try:
    handle = agent.initialize_xfer(operation, mine, theirs, name)
    state, end = agent.transfer(handle), time.monotonic() + 60
    while state == "PROC" and time.monotonic() < end:
        state = agent.check_xfer_state(handle)
    if operation == "READ" and state == "DONE":
        assert space[:] == b"T" * SIZE
except Exception as error:
    state = str(error)
print("go", file=target.stdin, flush=True)
got = next(line for line in lines if line in ("True", "False"))
said = f", target got the bytes: {got}" if operation == "WRITE" else ""
print(f"{kind} target, UCX_TLS={os.environ['UCX_TLS']}: {operation} {state}{said}", flush=True)
os._exit(0)
PY
for kind in ordinary:all unpinnable:all unpinnable:^cma; do
    for operation in WRITE READ; do
        UCX_TLS=${kind#*:} UCX_LOG_LEVEL=fatal "$dir/venv/bin/python" "$dir/try.py" initiator "${kind%:*}" "$operation" \
            2>>"$dir/log" | grep ' target, UCX_TLS=' >>"$dir/seen" || { cat "$dir/log"; exit 1; }
    done
done
diff -u <(sed -n '/^# Seen:/,/^# Needs/{s/^#   //p}' "$0") "$dir/seen"
echo "still so: no fall back"
