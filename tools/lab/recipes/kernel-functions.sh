# What the recipes for kernels share; stands in front of them.

# config_took WANTED GOT [NAMES]: prints what configuration WANTED says and GOT does not have, NAMES
# left out, and fails if there is anything. A missing tool, one of another version, or a dependency
# switches options off without a word.
config_took() {
    awk -v ignored=" ${3:-} " '
        /^CONFIG_/ { at = index($0, "="); name = substr($0, 1, at - 1); value = substr($0, at + 1) }
        /^# CONFIG_.* is not set$/ { name = $2; value = "n" }
        !/^(# )?CONFIG_/ { next }
        NR == FNR { got[name] = value; next }
        {
            has = name in got ? got[name] : "n"
            if (has != value && !index(ignored, " " name " ")) { print "    " name " is to be " value " and is " has; bad = 1 }
        }
        END { exit bad }
    ' "$2" "$1"
}

# keep_for_modules DIR: removes from a kernel's tree what no module's build against it reads.
keep_for_modules() (
    cd "$1"
    rm -rf Documentation/* samples/* tools/testing tools/perf vmlinux* .tmp_vmlinux*
    for d in arch/*/; do [ "$d" = arch/x86/ ] || rm -r "$d"; done
    for d in block certs crypto drivers fs init io_uring ipc kernel lib mm net security sound usr virt; do
        find "$d" -type f ! -name 'Kconfig*' ! -name 'Makefile*' ! -name Kbuild -delete
    done
    find arch rust -type f \( -name '*.o' -o -name '*.a' -o -name '.*.cmd' \) -delete
    rm -f .vmlinux.export.* arch/x86/boot/bzImage arch/x86/boot/vmlinux* arch/x86/boot/compressed/vmlinux*
)
