//! Sockets as the two directions that monitors have.

use blockyard_engine::sockets::Stream;

use crate::server::connection::{Input, Output};

/// The two directions of a connection.
pub type Halves = (Input, Output);

/// A connection as its two directions.
pub fn halves(stream: Stream) -> Halves {
    match stream {
        Stream::Unix(stream) => {
            let (input, output) = stream.into_split();
            (Box::new(input), Box::new(output))
        }
        Stream::Tcp(stream) => {
            let (input, output) = stream.into_split();
            (Box::new(input), Box::new(output))
        }
    }
}
