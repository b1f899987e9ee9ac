#!/bin/bash
# Slurm prolog: drains a node whose GPU topology has a fault (CRIT), before a job starts on it.
#
#   install -m 755 slurm_prolog.sh /etc/slurm/prolog.d/50-wsync-topo.sh
#   slurm.conf:  Prolog=/etc/slurm/prolog.d/*.sh   PrologFlags=Alloc
#
# Slurm runs prologs without a PATH, drains the node of one that fails, and forbids scontrol in it. The reason stands in
# slurmd's log. A found fault drains, and so does a call of the driver that does not return: that is a CRIT finding (the
# job's own calls would hang, too), found within 30 s (--timeout). Nothing else drains: neither a missing wsync, nor a
# check that gives no answer in 60 s, nor an input that cannot be read.
# Source: https://slurm.schedmd.com/prolog_epilog.html
#
# WSYNC_BIN           folder of the wsync command
# WSYNC_TOPO_INPUTS   files to judge instead of the machine, for a trial
export PATH="${WSYNC_BIN:-/opt/wsync/bin}:/usr/bin:/bin"

if ! command -v wsync >/dev/null; then
    echo "wsync topo: not installed in ${WSYNC_BIN:-/opt/wsync/bin}, topology not checked" >&2
    exit 0
fi

# Word splitting of the inputs is meant.
# shellcheck disable=SC2086
line=$(timeout --kill-after=5 60 wsync topo check --exit-style prolog --nagios ${WSYNC_TOPO_INPUTS:-})
status=$?

echo "wsync topo: ${line:-no answer (status $status)}" >&2
if [[ $status -eq 1 && $line == TOPO\ * ]]; then
    exit 1
fi
exit 0
