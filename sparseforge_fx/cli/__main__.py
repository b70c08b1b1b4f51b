from sparseforge_fx.cli import main

main()
