-- PostgreSQL has the journal up to a sequence number: trim it and tidy the dirty set.
-- KEYS: journal, shard, dirty
-- ARGV: thread, sequence number after the last flushed one
-- Returns {records removed, records left}.
local removed = redis.call('XTRIM', KEYS[1], 'MINID', ARGV[2] .. '-0')
local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
if first then
  redis.call('ZADD', KEYS[3], string.match(first[1], '%d+'), ARGV[1])
else
  redis.call('DEL', KEYS[1])
  redis.call('ZREM', KEYS[3], ARGV[1])
  redis.call('HDEL', KEYS[2], 't:' .. ARGV[1])
end
return {removed, first and redis.call('XLEN', KEYS[1]) or 0}
