"""The page: a view of folders on disk that starts the command line. It never imports torch and holds no truth."""
