//! An image is put on another backing file: whenever the power goes and whatever fails, it shows what it showed, through the
//! backing file that its header names then.

use std::cell::Cell;
use std::rc::Rc;

use blockyard_images::qcow2::layout::header::{Access, Header};
use blockyard_simulator::{Fault, Seed, each_seed, run};
use blockyard_storage::error::{EIO, ENOSPC};

use super::chain::{Chain, Nodes};
use crate::data::CpuPool;
use crate::error::EngineError;
use crate::images::{self, ImageReply, ImageWatcher, ImageWork, Means, RebaseSpec};
use crate::node::Node;

/// The name of the new backing file.
const NEW: &str = "new";

/// What an image is put on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Onto {
    /// A layer further down, or nothing where there is none of this number.
    Layer(usize),
    /// The top of a chain that has nothing to do with it.
    Other,
}

/// An image on a chain, which is its top, and what it is put on.
struct Place {
    chain: Chain,
    other: Chain,
    onto: Onto,
}

impl Place {
    fn random(seed: u64) -> Self {
        let chain = Chain::random(seed);
        let dice = Seed::new(seed ^ 0x4eba);
        let onto = match dice.one_in(3) {
            true => Onto::Other,
            false => Onto::Layer(2 + dice.below(chain.count() as u64 - 1) as usize),
        };
        let other = Chain::random(seed ^ 0x07e4);
        Self { chain, other, onto }
    }

    /// The new backing file, newly opened.
    fn new_backing(&self) -> Option<Rc<dyn Node>> {
        match self.onto {
            Onto::Other => {
                let nodes = self.other.open(&self.other.whole());
                Some(nodes.top as Rc<dyn Node>)
            }
            Onto::Layer(level) => self.chain.open_from(level),
        }
    }

    fn spec(&self) -> RebaseSpec {
        let is_there = self.new_backing().is_some();
        RebaseSpec {
            backing: None,
            backing_file: if is_there { NEW } else { "" }.to_owned(),
            backing_format: is_there.then(|| "qcow2".to_owned()),
            keeps_content: true,
            dry_run: false,
            force: false,
        }
    }

    fn open(&self) -> Nodes {
        self.chain.open(&self.chain.whole())
    }

    fn steps(&self) -> u64 {
        self.chain.steps() + self.other.steps()
    }

    fn step(&self) -> bool {
        self.chain.step() || self.other.step()
    }

    /// Runs it on these nodes; `None`: `goes_on` said no.
    fn rebase(&self, nodes: &Nodes, goes_on: impl Fn() -> bool) -> Option<Result<(), EngineError>> {
        let node: Rc<dyn Node> = nodes.top.clone();
        let work = ImageWork::Rebase(self.spec());
        let work = images::run(
            node,
            self.new_backing(),
            work,
            ImageWatcher::alone(),
            Means {
                cpu: CpuPool::on_the_spot(),
                files: Rc::clone(self.chain.yards[0].context.files()),
                changed: None,
            },
        );
        let ended = run(work, || goes_on() && self.step())?;
        Some(ended.map(|reply| assert!(matches!(reply, ImageReply::Rebased(_)))))
    }

    /// The image has nothing wrong but leaks, and shows what it showed through what its header names; `true`: the new one.
    fn judge(&self, what: &str) -> bool {
        let image = self.chain.yards[0].image.bytes();
        let header = Header::parse(&image, Access::ReadWrite).expect("it opens");
        let is_new = match header.backing_name.as_deref() {
            Some(b"base") => false,
            Some(name) => name == NEW.as_bytes(),
            None => true,
        };
        let nodes = match is_new {
            false => self.open(),
            true => {
                let yard = &self.chain.yards[0];
                let file = yard.file("file", &yard.image, false);
                let top = yard.open_over(file, self.new_backing());
                Nodes {
                    all: vec![top.clone()],
                    top,
                }
            }
        };
        let what = format!("{what}, {:?}, new: {is_new}", self.onto);
        let bytes = run(self.chain.reading(&nodes), || self.step()).expect("it ends");
        self.chain.assert_is_seen(&bytes, &what);
        drop(nodes);
        self.chain.assert_sound(true, &what);
        is_new
    }

    fn cut_power(&self) {
        self.chain.cut_power();
        self.other.cut_power();
    }
}

#[test]
fn an_image_shows_what_it_showed_on_its_new_backing_file() {
    let moved = Cell::new(0);
    each_seed("blockyard-engine", "an_image_shows_what", 150, |seed| {
        let place = Place::random(seed);
        let nodes = place.open();
        let before = place.chain.yards[0].image.bytes().len();
        let ended = place.rebase(&nodes, || true).expect("it ends");
        assert_eq!(ended, Ok(()));
        drop(nodes);
        // What has succeeded survives the power.
        place.cut_power();
        assert!(place.judge("after"), "the header is the old one");
        let grown = place.chain.yards[0].image.bytes().len() > before;
        moved.set(moved.get() + u32::from(grown));
    });
    if std::env::var_os("BLOCKYARD_SEED").is_none() {
        assert!(moved.get() > 20, "{} have got something", moved.get());
    }
}

#[test]
fn a_cut_at_any_step_of_it_changes_nothing_that_is_seen() {
    let (old, new) = (Cell::new(0), Cell::new(0));
    each_seed("blockyard-engine", "a_cut_at_any_step_of_it", 12, |seed| {
        for steps in 0.. {
            let place = Place::random(seed);
            let nodes = place.open();
            let last = place.steps() + steps;
            let ended = place.rebase(&nodes, || place.steps() < last);
            drop(nodes);
            place.cut_power();
            let is_new = place.judge(&format!("cut at step {steps}"));
            let seen = if is_new { &new } else { &old };
            seen.set(seen.get() + 1);
            if let Some(ended) = ended {
                assert_eq!(ended, Ok(()));
                assert!(is_new, "cut at the end");
                return;
            }
            if !is_new {
                let nodes = place.open();
                let again = place.rebase(&nodes, || true);
                assert_eq!(again, Some(Ok(())), "after a cut at step {steps}");
                drop(nodes);
                place.cut_power();
                assert!(place.judge("again"));
            }
        }
    });
    if std::env::var_os("BLOCKYARD_SEED").is_none() {
        let (old, new) = (old.get(), new.get());
        assert!(old > 100 && new > 12, "{old} old, {new} new");
    }
}

#[test]
fn whichever_request_of_it_fails_what_is_seen_stays() {
    let failed = Cell::new(0);
    each_seed("blockyard-engine", "whichever_request_of_it", 8, |seed| {
        let levels = Chain::random(seed).yards.len();
        for level in 0..levels {
            for nth in 1.. {
                let place = Place::random(seed);
                let nodes = place.open();
                let errno = if nth % 2 == 0 { EIO } else { ENOSPC };
                let world = &place.chain.yards[level].world;
                world.add_fault(Fault::fails(errno).nth(nth));
                let ended = place.rebase(&nodes, || true);
                let what = format!("{nth} of layer {level}");
                let ended = ended.unwrap_or_else(|| panic!("{what} hangs"));
                let failures = place.chain.failures();
                drop(nodes);
                world.heal();
                place.cut_power();
                let is_new = place.judge(&what);
                match ended {
                    Ok(()) => assert!(is_new, "{what}"),
                    Err(error) => {
                        assert!(failures > 0, "{what}: {error:?}");
                        failed.set(failed.get() + 1);
                    }
                }
                if failures == 0 {
                    break;
                }
            }
        }
    });
    if std::env::var_os("BLOCKYARD_SEED").is_none() {
        assert!(failed.get() > 50, "{} have failed", failed.get());
    }
}
