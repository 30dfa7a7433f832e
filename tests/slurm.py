"Slurm on one machine: `with slurm(folder)` starts munge, a controller and a node of their own below `folder`, and stops them"
import os, secrets, shutil, signal, socket, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path

NEEDED = ('munged', 'slurmctld', 'slurmd', 'sbatch')
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
JobRequeue=1
MinJobAge=10
KillWait=20
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=one Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""

def missing():
    "Programs of Debian's munge and slurm-wlm that are not installed"
    return [name for name in NEEDED if not found(name)]

def found(name): return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")

def free_ports(n):
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets: s.bind(('', 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets: s.close()
    return ports

def waits(done, what, seconds=60):
    end = time.monotonic()+seconds
    while not done():
        if time.monotonic() > end: raise TimeoutError(f'{what} did not come up in {seconds} s')
        time.sleep(0.2)

@contextmanager
def slurm(
    folder:Path,    # for its files, short enough for a socket's name
    cpus:int=4,     # that it shares out; more than the machine has is fine
):                  # variables that its commands need
    "A cluster of one node"
    folder = Path(folder).resolve()
    host = socket.gethostname().partition('.')[0]
    for name in ('state', 'spool'): (folder/name).mkdir(parents=True)
    folder.chmod(0o755)  # munge refuses a socket below a folder that others may write to
    key = folder/'munge.key'
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    conf = folder/'slurm.conf'
    conf.write_text(CONF.format(host=host, user=os.environ.get('USER') or 'root', ports=free_ports(2), folder=folder, cpus=cpus))
    env = os.environ | dict(SLURM_CONF=str(conf))
    commands = dict(
        munged=['--foreground', '--force', *(f'--{name}={folder}/munge.{end}' for name, end in
                dict(zip(('key-file', 'socket', 'pid-file', 'log-file', 'seed-file'), ('key', 'socket', 'pid', 'log', 'seed'))).items())],
        slurmctld=['-D'], slurmd=['-D', '-N', host])
    started = []
    def answers(*words): return subprocess.run(words, env=env, capture_output=True, text=True)
    try:
        for name, words in commands.items():
            with (folder/f'{name}.out').open('w') as out:
                started.append(subprocess.Popen([found(name), *words], env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True))
            if name == 'munged': waits((folder/'munge.socket').exists, name)
            if name == 'slurmctld': waits(lambda: answers('scontrol', 'ping').returncode == 0, name)
        waits(lambda: 'idle' in answers('sinfo', '-h', '-o', '%T').stdout, 'slurmd')
        yield dict(SLURM_CONF=str(conf))
    finally:
        answers('scancel', '--user', str(os.getuid()))
        for process in reversed(started):
            process.terminate()
            try: process.wait(20)
            except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL)

if __name__ == '__main__':  # python tests/slurm.py FOLDER COMMAND...: run a command on such a cluster
    with slurm(Path(sys.argv[1])) as variables: raise SystemExit(subprocess.call(sys.argv[2:], env=os.environ | variables))
