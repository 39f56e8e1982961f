"""The forensics room: take any recorded step back and run it again. (Empty until the flight recorder exists.)"""

if __name__ != "minitrain.replay":
    raise ImportError("this folder is minitrain.replay; install the package (make) and import minitrain")
