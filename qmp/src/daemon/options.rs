//! The daemon's options: a first pass over all of them, then what remains in its order.

use std::ffi::OsString;
use std::path::PathBuf;

use blockyard_engine::engine::{BackendChoice, EngineConfig};
use blockyard_engine::image_policy::NamesInImages;

/// How the daemon was asked to start.
#[derive(Debug)]
pub struct Options {
    /// What the engine is set up with.
    pub engine: EngineConfig,
    /// Go to the background once everything is set up.
    pub daemonize: bool,
    /// End when the process that started it ends.
    pub end_with_parent: bool,
    /// Where the process id goes.
    pub pidfile: Option<PathBuf>,
    /// Everything else, in order.
    pub steps: Vec<Step>,
}

/// An option that is carried out in its turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What it does.
    pub kind: StepKind,
    /// Its argument as it was given.
    pub argument: String,
}

/// What an option does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepKind {
    /// Adds a node.
    Blockdev,
    /// Opens a way for clients.
    Chardev,
    /// Serves QMP on a chardev.
    Monitor,
    /// Creates an object.
    Object,
    /// Exports a node.
    Export,
    /// Starts the NBD server.
    NbdServer,
}

impl Step {
    /// The option as error messages show it.
    pub fn shown(&self) -> String {
        let name = STEPS
            .iter()
            .find(|(_, kind)| *kind == self.kind)
            .map_or("", |(name, _)| name);
        format!("{name} {}", self.argument)
    }
}

const STEPS: &[(&str, StepKind)] = &[
    ("--blockdev", StepKind::Blockdev),
    ("--chardev", StepKind::Chardev),
    ("--monitor", StepKind::Monitor),
    ("--object", StepKind::Object),
    ("--export", StepKind::Export),
    ("--nbd-server", StepKind::NbdServer),
];

/// What the first pass came to.
#[derive(Debug)]
pub enum Asked {
    /// Start.
    Start(Box<Options>),
    /// Print how to use it.
    Help,
    /// Print the version.
    Version,
}

/// Reads all options; nothing has been done when one is refused.
///
/// # Errors
/// A message for the user, in QEMU's words where it has some.
pub fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Asked, String> {
    let mut options = Options {
        engine: EngineConfig::default(),
        daemonize: false,
        end_with_parent: false,
        pidfile: None,
        steps: Vec::new(),
    };
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        let text = text(argument)?;
        if !text.starts_with('-') || text == "-" {
            return Err(format!("{text}: Unexpected argument"));
        }
        if let Some(letter) = text.chars().nth(1).filter(|letter| *letter != '-')
            && !matches!(letter, 'h' | 'V' | 'T')
        {
            return Err(format!("invalid option -- '{letter}'"));
        }
        let whole = text.clone();
        let (name, attached) = match text.split_once('=') {
            Some((name, value)) if text.starts_with("--") => {
                (name.to_owned(), Some(value.to_owned()))
            }
            _ => (text, None),
        };
        let mut value = || match attached.clone() {
            Some(value) => Ok(value),
            None => match arguments.next() {
                Some(value) => self::text(value),
                None => Err(format!("option '{name}' requires an argument")),
            },
        };
        match name.as_str() {
            "-h" | "--help" => return Ok(Asked::Help),
            "-V" | "--version" => return Ok(Asked::Version),
            "--daemonize" => options.daemonize = true,
            "--end-with-parent" => options.end_with_parent = true,
            "--pidfile" => options.pidfile = Some(PathBuf::from(value()?)),
            // Accepted, so that scripts that trace QEMU still start; RUST_LOG does the work here.
            "-T" | "--trace" => {
                value()?;
            }
            "--data-threads" => {
                let value = value()?;
                options.engine.data_threads = match value.parse() {
                    Ok(threads @ 1..=64) => threads,
                    _ => return Err(format!("{name} {value}: a number from 1 to 64 is expected")),
                };
            }
            "--state-dir" => options.engine.state_dir = Some(PathBuf::from(value()?)),
            "--image-root" => options.engine.images.roots.push(PathBuf::from(value()?)),
            "--image-names" => {
                let value = value()?;
                options.engine.images.names = match value.as_str() {
                    "files" => NamesInImages::Files,
                    "qemu" => NamesInImages::AsQemu,
                    _ => return Err(format!("{name} {value}: files or qemu is expected")),
                };
            }
            "--io-backend" => {
                let value = value()?;
                options.engine.backend = match value.as_str() {
                    "auto" => BackendChoice::Auto,
                    "io_uring" => BackendChoice::Uring,
                    "threads" => BackendChoice::Threads,
                    _ => {
                        return Err(format!(
                            "{name} {value}: auto, io_uring or threads is expected"
                        ));
                    }
                };
            }
            _ => match STEPS.iter().find(|(step, _)| *step == name) {
                Some((_, kind)) => options.steps.push(Step {
                    kind: *kind,
                    argument: value()?,
                }),
                None => return Err(format!("unrecognized option '{whole}'")),
            },
        }
    }
    if options.daemonize && options.end_with_parent {
        return Err("--end-with-parent: with --daemonize the parent leaves at once".to_owned());
    }
    Ok(Asked::Start(Box::new(options)))
}

fn text(argument: OsString) -> Result<String, String> {
    argument
        .into_string()
        .map_err(|argument| format!("{}: this is not UTF-8", argument.to_string_lossy()))
}

/// What `--help` prints.
pub const HELP: &str = "\
Usage: blockyard daemon [OPTION]...

Runs block jobs on disk images, driven over QMP. Takes the options of
qemu-storage-daemon. They are carried out in their order, so an option can
only name what stands before it.

  --blockdev [driver=]DRIVER,node-name=NAME[,KEY=VALUE]... | JSON
        open a node; the same as the command blockdev-add
  --chardev socket,id=ID,path=PATH,server=on,wait=off
  --chardev socket,id=ID,path=PATH[,reconnect-ms=N]
  --chardev socket,id=ID,host=HOST,port=PORT,...
  --chardev socket,id=ID,fd=N,...
  --chardev stdio,id=ID
        a way for QMP clients to get in (server=on: any number of them at
        once), or to be reached (without server=on)
  --monitor [chardev=]ID[,mode=control][,pretty=on|off]
        speak QMP on a chardev
  --object [qom-type=]iothread,id=ID | JSON
  --object [qom-type=]throttle-group,id=ID,limits.bps-total=N,...
        create an object; the same as the command object-add
  --nbd-server addr.type=unix,addr.path=PATH[,OPTION=VALUE]...
  --nbd-server addr.type=inet,addr.host=HOST,addr.port=PORT[,OPTION=VALUE]...
        start the NBD server; the same as the command nbd-server-start.
        OPTION: max-connections, handshake-max-seconds, tls-creds, tls-authz
  --export [type=]nbd,id=ID,node-name=NAME[,name=EXPORT][,writable=on|off]
        [,description=TEXT][,allocation-depth=on|off][,bitmaps.N=BITMAP]
        [,writethrough=on|off][,allow-inactive=on|off] | JSON
        let clients use a node; the same as the command block-export-add
  --daemonize
        go to the background once everything is set up
  --end-with-parent
        end, as on SIGTERM, when the process that started this one ends
  --pidfile PATH
        write the process id to PATH once everything is set up
  --data-threads N
        threads that move data (default: one per core, four at most)
  --io-backend auto|io_uring|threads
        how files are read and written (default: auto, io_uring where it
        is allowed)
  --image-names files|qemu
        which names that stand in images are followed to backing files and
        data files (default: files, those of files whose format is stated;
        qemu: any json: names and guessed formats, too)
  --image-root DIR
        files that images name must be below DIR once symbolic links are
        resolved; may be given several times
  --state-dir DIR
        keep in DIR what has to be found again if the daemon is killed:
        which parts of images with persistent bitmaps may have changed, so
        that their bitmaps stay usable; one daemon at a time
  -h, --help
  -V, --version

Log messages go to standard error; RUST_LOG=debug shows more of them.

Exit codes: 0, ended and all is saved; 1, it could not be started, or a node
could not be flushed or closed, or a job or a request did not end: standard
error says which. Of qemu-storage-daemon's, the second is 0.

Example:
  blockyard daemon \\
      --blockdev file,node-name=disk,filename=disk.raw \\
      --chardev socket,id=qmp,path=qmp.sock,server=on,wait=off \\
      --monitor qmp
";

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &[&str]) -> Result<Asked, String> {
        parse(arguments.iter().map(OsString::from))
    }

    #[test]
    fn order_is_kept_and_first_pass_options_may_stand_anywhere() {
        let Ok(Asked::Start(options)) = parsed(&[
            "--blockdev",
            "a",
            "--pidfile=p",
            "--monitor=m",
            "--daemonize",
            "--blockdev",
            "b",
        ]) else {
            panic!("accepted")
        };
        let shown: Vec<_> = options.steps.iter().map(Step::shown).collect();
        assert_eq!(shown, ["--blockdev a", "--monitor m", "--blockdev b"]);
        assert_eq!(options.pidfile, Some(PathBuf::from("p")));
        assert!(options.daemonize);
    }

    #[test]
    fn refusals_are_those_of_the_reference() {
        for (arguments, expected) in [
            (&["--frob"][..], "unrecognized option '--frob'"),
            (&["stray"], "stray: Unexpected argument"),
            (&["--pidfile"], "option '--pidfile' requires an argument"),
            (
                &["--end-with-parent", "--daemonize"],
                "--end-with-parent: with --daemonize the parent leaves at once",
            ),
            (
                &["--data-threads", "0"],
                "--data-threads 0: a number from 1 to 64 is expected",
            ),
            (
                &["--image-names", "all"],
                "--image-names all: files or qemu is expected",
            ),
        ] {
            assert_eq!(parsed(arguments).expect_err("refused"), expected);
        }
    }
}
