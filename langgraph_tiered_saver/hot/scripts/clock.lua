-- Let a shard's clock start no earlier than PostgreSQL's last sequence number.
-- KEYS: clock
-- ARGV: sequence number
-- Returns the clock.
local last = tonumber(redis.call('GET', KEYS[1]) or '0')
if last < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], ARGV[1]) end
return redis.call('GET', KEYS[1])
