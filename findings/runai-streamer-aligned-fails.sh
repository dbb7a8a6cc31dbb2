#!/usr/bin/env bash
# Software:  runai-model-streamer 0.17.1 (PyPI), its libstreamer.so, on Linux with O_DIRECT and memfd_secret().
# Behaviour: into memory that the kernel cannot pin (here memfd_secret; a mapping of a dma-buf or of a PCI BAR is
#            of that kind, too) an aligned read fails with 'Unknown Error' under both O_DIRECT strategies and does not
#            fall back, while the same read to an address one byte further succeeds, through a bounce buffer.
#            The buffered strategy serves both. Besides, an empty range beyond the file's end is a success
#            for the O_DIRECT strategies and an error for the buffered one.
# Seen:
#   io_uring_direct: aligned 11 Unknown Error, one byte further 0, ordinary memory 0, empty beyond the end 0
#   libaio_direct: aligned 11 Unknown Error, one byte further 0, ordinary memory 0, empty beyond the end 0
#   sync_buffered: aligned 0, one byte further 0, ordinary memory 0, empty beyond the end 3 End of file reached
# Needs: python3 with venv, pip; io_uring and memfd_secret allowed; O_DIRECT where mktemp puts files. No root.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check --no-deps runai-model-streamer==0.17.1
head -c 1048576 /dev/urandom >"$dir/file"
cat >"$dir/try.py" <<'PY'
import ctypes as c, mmap, os, site, sys
path = sys.argv[1]
lib = c.CDLL(site.getsitepackages()[0] + "/runai_model_streamer/libstreamer/lib/libstreamer.so")
class Device(c.Structure):
    _fields_ = [("kind", c.c_int), ("id", c.c_int)]
start, ask = lib.runai_file_streamer_start, lib.runai_file_streamer_request
answer, text = lib.runai_file_streamer_response, lib.runai_file_streamer_response_str
text.restype = c.c_char_p
ask.argtypes = [c.c_void_p, c.c_void_p, c.c_uint32] + [c.c_void_p] * 5 + [Device]
answer.argtypes = [c.c_void_p] * 5 + [c.c_uint]
streamer = c.c_void_p()
assert start(c.byref(streamer)) == 0

def read(offset, size, address):
    number = c.c_uint64()
    one = lambda kind, value: c.byref(kind(value))
    asked = ask(streamer, c.byref(number), 1, one(c.c_char_p, path.encode()), one(c.c_uint32, 1),
                one(c.c_size_t, offset), one(c.c_size_t, size), one(c.c_void_p, address), Device(0, 0))
    assert asked == 0, text(asked)
    file, index, done = c.c_uint32(), c.c_uint32(), c.c_int()
    code = answer(streamer, c.byref(number), c.byref(file), c.byref(index), c.byref(done), 60_000)
    return str(code) if code == 0 else f"{code} {text(code).decode()}"

size = os.path.getsize(path)
fd = c.CDLL(None, use_errno=True).syscall(447, 0)
if fd < 0:
    sys.exit(f"memfd_secret: {os.strerror(c.get_errno())}: cannot be shown here")
os.ftruncate(fd, 2 * size)
secret, plain = mmap.mmap(fd, 2 * size), mmap.mmap(-1, size)
base = c.addressof(c.c_char.from_buffer(secret))
results = [read(0, size, base), read(0, size, base + 1)]
assert secret[1:size + 1] == open(path, "rb").read()
results += [read(0, size, c.addressof(c.c_char.from_buffer(plain))), read(size + 4096, 0, base)]
print("{}: aligned {}, one byte further {}, ordinary memory {}, empty beyond the end {}".format(
    os.environ["RUNAI_STREAMER_FS_STRATEGY"], *results), flush=True)
PY
for strategy in io_uring_direct libaio_direct sync_buffered; do
    RUNAI_STREAMER_FS_STRATEGY=$strategy "$dir/venv/bin/python" "$dir/try.py" "$dir/file" >>"$dir/seen" 2>"$dir/log" ||
        { cat "$dir/log"; exit 1; }
done
diff -u <(sed -n '/^# Seen:/,/^# Needs/{s/^#   //p}' "$0") "$dir/seen"
echo "still so: the aligned read fails"
