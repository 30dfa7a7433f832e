"The command `python -m nwrepro.known`"
from .training.known import main

if __name__ == '__main__': raise SystemExit(main())
