from tests.pretend_gpu import main

main()
