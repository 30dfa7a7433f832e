"The command `python -m nwrepro.training`"
from .command import main

if __name__ == '__main__': raise SystemExit(main())
