"""`python -m hf_iau`, and `accelerate launch -m hf_iau`: the command line."""

from hf_iau.cli import main

if __name__ == "__main__":
    main()
